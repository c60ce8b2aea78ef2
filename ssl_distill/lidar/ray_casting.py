"""Rays against a plane, boxes, upright cylinders and spheres: the nearest entry. numpy, float64."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

T_MIN, T_MAX = 0.5, 60.0  # metres along a ray of unit length
MISS = -1.0


class Solids(NamedTuple):
    """What a scene is made of, beside the ground; lengths in metres, angles in radians.

    Attributes:
        ground_z: Height of the plane.
        boxes: Centre x, y, z; length, width, height; yaw.
        cylinders: Centre x, y, z; radius, height. They have no caps.
        spheres: Centre x, y, z; radius.
    """

    ground_z: float
    boxes: Float[np.ndarray, "_ 7"]
    cylinders: Float[np.ndarray, "_ 5"]
    spheres: Float[np.ndarray, "_ 4"]


class Hits(NamedTuple):
    """What each ray meets first.

    Attributes:
        distance: Along the ray; -1 where it meets nothing.
        solid: Number of the solid, the ground 0, then boxes, cylinders and spheres; -1 for nothing.
        normal: Unit normal of the surface, towards the ray's side; 0 for nothing.
    """

    distance: Float[np.ndarray, "R"]
    solid: Int[np.ndarray, "R"]
    normal: Float[np.ndarray, "R 3"]


def entry_distances(
    origin: Float[np.ndarray, "3"], directions: Float[np.ndarray, "R 3"], solids: Solids
) -> Float[np.ndarray, "R S"]:
    """Distance at which every ray enters every solid, -1 where it does not; a solid around the origin is not seen."""
    distances = [_ground(origin, directions, solids.ground_z)]
    distances += [_box(origin, directions, box)[0] for box in solids.boxes]
    distances += [_cylinder(origin, directions, cylinder) for cylinder in solids.cylinders]
    distances += [_sphere(origin, directions, sphere) for sphere in solids.spheres]
    table = np.stack(distances, 1)
    return np.where((table > T_MIN) & (table < T_MAX), table, MISS)


def cast(origin: Float[np.ndarray, "3"], directions: Float[np.ndarray, "R 3"], solids: Solids) -> Hits:
    """The nearest entry of every ray; of equal ones that of the first solid."""
    table = entry_distances(origin, directions, solids)
    table[table == MISS] = np.inf
    solid = table.argmin(1)
    distance = table[np.arange(len(table)), solid]
    missed = np.isinf(distance)
    solid[missed] = -1
    distance[missed] = MISS
    return Hits(distance, solid, _normals(origin, directions, distance, solid, solids))


def camera_rays(
    height: int, width: int, intrinsics: Float[np.ndarray, "3 3"], rotation: Float[np.ndarray, "3 3"]
) -> Float[np.ndarray, "H W 3"]:
    """Unit directions through the pixels' centres.

    Args:
        height: Rows.
        width: Columns.
        intrinsics: Focal lengths and principal point in pixels.
        rotation: From the world to the camera's axes: x right, y down, z forward.
    """
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    x, y = (u - intrinsics[0, 2]) / intrinsics[0, 0], (v - intrinsics[1, 2]) / intrinsics[1, 1]
    directions = np.stack([x, y, np.ones_like(x)], 2) @ rotation
    unit: Float[np.ndarray, "H W 3"] = directions / np.linalg.norm(directions, axis=2, keepdims=True)
    return unit


def turned(vectors: Float[np.ndarray, "*shape 3"], yaw: float) -> Float[np.ndarray, "*shape 3"]:
    """Turned about the vertical axis."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return vectors @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])


def _ground(origin: np.ndarray, directions: np.ndarray, z: float) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return (z - origin[2]) / directions[:, 2]


def _box(origin: np.ndarray, directions: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of the entry, and the axis of the side where it is."""
    start, ray = turned(origin - box[:3], -box[6]), turned(directions, -box[6])
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (-box[3:6] / 2 - start) / ray, (box[3:6] / 2 - start) / ray
    entries = np.minimum(first, second)
    entry, exit_ = entries.max(1), np.maximum(first, second).min(1)
    return np.where(entry <= exit_, entry, MISS), entries.argmax(1)


def _cylinder(origin: np.ndarray, directions: np.ndarray, cylinder: np.ndarray) -> np.ndarray:
    start = origin - cylinder[:3]
    distance = _near_root(
        (directions[:, :2] ** 2).sum(1), directions[:, :2] @ start[:2], start[:2] @ start[:2] - cylinder[3] ** 2
    )
    inside = np.abs(start[2] + distance * directions[:, 2]) <= cylinder[4] / 2
    return np.where(inside, distance, MISS)


def _sphere(origin: np.ndarray, directions: np.ndarray, sphere: np.ndarray) -> np.ndarray:
    start = origin - sphere[:3]
    return _near_root((directions**2).sum(1), directions @ start, start @ start - sphere[3] ** 2)


def _near_root(a: np.ndarray, half_b: np.ndarray, c: float) -> np.ndarray:
    """Smaller solution of a t^2 + 2 half_b t + c = 0, or -1."""
    discriminant = half_b**2 - a * c
    with np.errstate(divide="ignore", invalid="ignore"):
        root = (-half_b - np.sqrt(np.maximum(discriminant, 0))) / a
    return np.where((discriminant >= 0) & (a > 0), root, MISS)


def _normals(
    origin: np.ndarray, directions: np.ndarray, distance: np.ndarray, solid: np.ndarray, solids: Solids
) -> np.ndarray:
    normals = np.zeros_like(directions)
    normals[solid == 0] = (0, 0, 1)
    number = 1
    for box in solids.boxes:
        rays = solid == number
        if rays.any():
            axis = _box(origin, directions[rays], box)[1]
            side = np.zeros((len(axis), 3))
            along = turned(directions[rays], -box[6])[np.arange(len(axis)), axis]
            side[np.arange(len(axis)), axis] = -np.sign(along)
            normals[rays] = turned(side, box[6])
        number += 1
    for center, radius, flat in (
        *((cylinder[:3], cylinder[3], True) for cylinder in solids.cylinders),
        *((sphere[:3], sphere[3], False) for sphere in solids.spheres),
    ):
        rays = solid == number
        outwards = (origin + distance[rays, None] * directions[rays] - center) / radius
        if flat:
            outwards[:, 2] = 0
        normals[rays] = outwards
        number += 1
    return normals
