"""A raw scan as what a point network eats; numpy, in loader processes."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.spatial import cKDTree

from ssl_distill.lidar.batch import PointBatch
from ssl_distill.lidar.frames import Sensor

_BORDER_M = 1e-4  # points so near to the border of the field of view are left out
_PLANES = {2: (0, 1), 1: (0, 2), 0: (1, 2)}  # projection along an axis: the axes of rows and columns


def first_per_voxel(
    points: Float[np.ndarray, "N _"], size_m: float, order: Int[np.ndarray, "N"] | None = None
) -> Int[np.ndarray, "M"]:
    """Rows of one point per occupied voxel, sorted by the voxel's x, then y, then z. Kept points are real ones.

    Args:
        points: x, y, z first; voxels start at the smallest coordinates and are computed in the points' precision.
        size_m: Edge of a voxel in metres; 0 keeps all rows.
        order: A permutation of the rows in which the first of a voxel is taken; None is the order they have.
    """
    if size_m <= 0:
        return np.arange(len(points)) if order is None else order
    if not len(points):
        return np.empty(0, np.int64)
    coordinates = points[:, :3] if order is None else points[order, :3]
    key = ((coordinates - coordinates.min(0)) / size_m).astype(np.int64)  # not negative, so truncation is floor
    _, span_y, span_z = key.max(0) + 1
    _, first = np.unique((key[:, 0] * span_y + key[:, 1]) * span_z + key[:, 2], return_index=True)
    return first if order is None else order[first]


def nearest_to(points: Float[np.ndarray, "N _"], center: Float[np.ndarray, "3"], count: int) -> Int[np.ndarray, "M"]:
    """Rows of the `count` points nearest to a place, nearest first; of all where there are no more."""
    if len(points) <= count:
        return np.arange(len(points))
    distance = np.square(points[:, :3] - center).sum(1)
    return distance.argsort(kind="stable")[:count]


def inside_view(
    coordinates: Float[np.ndarray, "N _"], fov_min: Sequence[float], fov_max: Sequence[float]
) -> Bool[np.ndarray, "N"]:
    """Points strictly inside the field of view, a box from `fov_min` to `fov_max` in metres."""
    lower, upper = np.asarray(fov_min) + _BORDER_M, np.asarray(fov_max) - _BORDER_M
    return np.all((coordinates[:, :3] > lower) & (coordinates[:, :3] < upper), axis=1)


def feature_columns(points: Float[np.ndarray, "N 4"], sensor: Sensor) -> Float[np.ndarray, "N 5"]:
    """Normalised intensity, x, y, z, distance from the sensor."""
    intensity = (points[:, 3:] - sensor.intensity_mean) / sensor.intensity_std
    radius = np.linalg.norm(points[:, :3], axis=1, keepdims=True)
    return np.concatenate([intensity, points[:, :3], radius], axis=1)


def cell_indices(
    coordinates: Float[np.ndarray, "N _"],
    fov_min: Sequence[float],
    fov_max: Sequence[float],
    grids: Sequence[Sequence[int]],
    projected_axes: Sequence[int] = (2, 1, 0),
) -> Int[np.ndarray, "N A"]:
    """Flat index of each point's cell, for every projection.

    Args:
        coordinates: Inside the field of view.
        fov_min: Lower corner of the field of view in metres.
        fov_max: Upper corner.
        grids: Rows and columns per projection.
        projected_axes: The axis that each projection looks along: 2 is from above.

    Raises:
        ValueError: If a point is outside.
    """
    lower, upper = np.asarray(fov_min, np.float64), np.asarray(fov_max, np.float64)
    cells = []
    for axis, grid in zip(projected_axes, grids, strict=True):
        plane = list(_PLANES[axis])
        resolution = (upper - lower)[plane] / np.array(grid)
        place = ((coordinates[:, plane].astype(np.float64) - lower[plane]) / resolution).astype(np.int64)
        if len(place) and (place.min() < 0 or np.any(place >= np.array(grid))):
            raise ValueError(f"`coordinates` must lie in the field of view {fov_min} to {fov_max}; crop them first.")
        cells.append(place[:, 0] * grid[1] + place[:, 1])
    return np.stack(cells, 1)


def nearest_neighbors(coordinates: Float[np.ndarray, "N _"], num_neighbors: int) -> Int[np.ndarray, "N K"]:
    """Rows of every point itself and of its nearest others, ascending by distance: K is `num_neighbors` + 1.

    Deviation: where there are fewer others, the farthest one is repeated; the published code fails.
    """
    tree = cKDTree(coordinates[:, :3])
    found = min(num_neighbors + 1, len(coordinates))
    _, rows = tree.query(coordinates[:, :3], k=[*range(1, found + 1)])
    return np.pad(rows, ((0, 0), (0, num_neighbors + 1 - found)), mode="edge")


def nearest_kept(kept: Float[np.ndarray, "M _"], points: Float[np.ndarray, "N _"]) -> Int[np.ndarray, "N"]:
    """Row of the nearest kept point for every original one: what reads predictions back."""
    return cKDTree(kept[:, :3]).query(points[:, :3])[1]


class Preparation:
    """Field of view, grids and sizes, the same for training and evaluation; the defaults are ScaLR's.

    Args:
        grids: Rows and columns of each projection's grid; the network's own.
        fov_min: Lower corner of the field of view in metres.
        fov_max: Upper corner.
        voxel_size_m: Edge of the voxels that keep one point each; 0 keeps all points.
        num_neighbors: Neighbours of every point, without itself.
        max_points: Most points in a training cloud: those nearest to a random one.

    Source: WaffleIron (arXiv 2301.10100) and ScaLR (arXiv 2310.17504), by their published code.
    """

    def __init__(
        self,
        grids: Sequence[Sequence[int]] = ((256, 256), (256, 32), (256, 32)),
        fov_min: Sequence[float] = (-64.0, -64.0, -8.0),
        fov_max: Sequence[float] = (64.0, 64.0, 8.0),
        voxel_size_m: float = 0.1,
        num_neighbors: int = 16,
        max_points: int = 20000,
    ) -> None:
        if len(fov_min) != 3 or len(fov_max) != 3 or any(a >= b for a, b in zip(fov_min, fov_max, strict=True)):
            raise ValueError(f"`fov_min` must be below `fov_max` on three axes, got {fov_min} and {fov_max}.")
        if len(grids) != 3 or min(min(grid) for grid in grids) < 1:
            raise ValueError(f"`grids` must be three pairs of positive numbers, got {grids}.")
        for name, value in {"num_neighbors": num_neighbors, "max_points": max_points}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.grids = tuple((rows, columns) for rows, columns in grids)
        self.fov_min = tuple(fov_min)
        self.fov_max = tuple(fov_max)
        self.voxel_size_m = voxel_size_m
        self.num_neighbors = num_neighbors
        self.max_points = max_points

    def inside(self, coordinates: Float[np.ndarray, "N _"]) -> Bool[np.ndarray, "N"]:
        """Points inside the field of view."""
        return inside_view(coordinates, self.fov_min, self.fov_max)

    def cloud(self, coordinates: Float[np.ndarray, "N _"], features: Float[np.ndarray, "N 5"]) -> PointBatch:
        """A batch of one cloud.

        Args:
            coordinates: Inside the field of view; they decide cells and neighbours.
            features: What the network sees of the points.
        """
        cells = cell_indices(coordinates, self.fov_min, self.fov_max, self.grids)
        neighbors = nearest_neighbors(coordinates, self.num_neighbors)
        return PointBatch(
            torch.from_numpy(np.asarray(features, np.float32)),
            torch.from_numpy(cells),
            torch.from_numpy(neighbors),
            torch.tensor([len(coordinates)]),
        )
