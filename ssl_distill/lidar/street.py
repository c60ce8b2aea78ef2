"""Generated streets: solids at random places, seen by a lidar and by cameras. Everything is known exactly."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from ssl_distill.lidar.frames import IGNORED, Camera, LidarCameraFrame, Sensor
from ssl_distill.lidar.ray_casting import Hits, Solids, camera_rays, cast, turned

GROUND_Z = -1.8  # metres below the lidar, which is the origin
SENSOR = Sensor(intensity_mean=0.3, intensity_std=0.15)
IMAGE_SIZE = (96, 192)
CAMERA_YAWS_DEG = (0, 90, 180, 270)
INTRINSICS = np.array([[96.0, 0, 96.0], [0, 96.0, 0.42 * 96], [0, 0, 1]])  # 90 degrees wide
_CAMERA_FORWARD, _CAMERA_UP = 0.3, -0.2  # metres from the lidar
_BEAMS_DEG = np.linspace(-25, 8, 24)
_NUM_AZIMUTHS = 360
_RANGE_NOISE, _DROPOUT, _INTENSITY_NOISE, _PIXEL_NOISE = 0.02, 0.03, 0.12, 0.015
_REACH = 30.0  # metres along the street in which small objects stand
_CLEARANCE = 3.0  # metres around the lidar that are free
_TRIES = 20


def _plain(at: np.ndarray) -> np.ndarray:
    return np.ones(len(at))


def _noise(at: np.ndarray) -> np.ndarray:
    waves = np.sin(2.3 * at[:, 0] + 0.4) * np.sin(2.9 * at[:, 1] + 1.1) * np.sin(3.1 * at[:, 2] + 1.3)
    return 1 + 0.25 * waves


def _checkers(side: tuple[float, float, float], dark: float, bright: float) -> Callable[[np.ndarray], np.ndarray]:
    def texture(at: np.ndarray) -> np.ndarray:
        odd = np.floor(at / side).sum(1) % 2
        return np.where(odd == 1, dark, bright)

    return texture


class Material(NamedTuple):
    """What all objects of a class have in common.

    Attributes:
        name: Of the class.
        color: RGB in [0, 1].
        texture: Place in the object's coordinates to a factor on the colour.
        reflectance: For the lidar.
        radius: Metres around the centre in which no other object stands.
    """

    name: str
    color: tuple[float, float, float]
    texture: Callable[[np.ndarray], np.ndarray]
    reflectance: float
    radius: float = 0.0


MATERIALS = (
    Material("road", (0.33, 0.33, 0.36), _noise, 0.18),
    Material("sidewalk", (0.62, 0.58, 0.54), _checkers((0.6, 0.6, np.inf), 0.88, 1.12), 0.27),
    Material("terrain", (0.30, 0.46, 0.18), _noise, 0.30),
    Material("building", (0.66, 0.42, 0.30), _checkers((1.0, 1.0, 0.4), 0.8, 1.1), 0.38),
    Material("car", (0.70, 0.12, 0.14), _plain, 0.42, 2.6),
    Material("truck", (0.86, 0.78, 0.22), _checkers((0.8, np.inf, np.inf), 0.75, 1.15), 0.40, 4.5),
    Material("pedestrian", (0.20, 0.28, 0.72), _plain, 0.30, 0.6),
    Material("pole", (0.75, 0.76, 0.80), _plain, 0.50, 0.5),
    Material("trunk", (0.36, 0.24, 0.14), _plain, 0.28, 1.2),
    Material("crown", (0.14, 0.36, 0.12), _noise, 0.34),
    Material("barrier", (0.92, 0.48, 0.16), _checkers((0.4, np.inf, np.inf), 0.75, 1.15), 0.55, 2.0),
)
CLASS_NAMES = tuple(material.name for material in MATERIALS)
_CLASS = {name: number for number, name in enumerate(CLASS_NAMES)}


class Street(NamedTuple):
    """A scene around the lidar.

    Attributes:
        solids: In the lidar's frame.
        solid_class: Class of every solid but the ground, in the order of `Hits.solid` from 1 on.
        colors: RGB of the road, of the terrain, and of every other solid.
        road_half_width: Metres; the rest of the ground is terrain.
        heading: Angle from the lidar's x axis to the street, in radians.
        sun: Unit vector towards it.
    """

    solids: Solids
    solid_class: Int[np.ndarray, "S"]
    colors: Float[np.ndarray, "_ 3"]
    road_half_width: float
    heading: float
    sun: Float[np.ndarray, "3"]


def make_street(random: np.random.Generator) -> Street:
    """Draw a scene; x runs along the street until all is turned by the heading at the end."""
    half_width, walk = random.uniform(3.5, 6), random.uniform(1.5, 3)
    edge = half_width + walk  # outer border of the sidewalk
    boxes = [
        ("sidewalk", [0, side * (half_width + walk / 2), GROUND_Z + 0.075, 140, walk, 0.15, 0]) for side in (-1, 1)
    ]
    for side in (-1, 1):
        x = -40.0
        while x < 40:
            length, depth, height = random.uniform(6, 14), random.uniform(5, 9), random.uniform(4, 12)
            y = side * (edge + random.uniform(2, 6) + depth / 2)
            if random.random() < 0.75:
                boxes.append(("building", [x + length / 2, y, GROUND_Z + height / 2, length, depth, height, 0]))
            x += length + random.uniform(1, 6)

    taken: list[tuple[float, float, float]] = [(0.0, 0.0, _CLEARANCE)]
    cylinders, spheres = [], []

    def either_side() -> int:
        return int(random.choice((-1, 1)))

    def free_place(name: str, y: Callable[[], float]) -> tuple[float, float] | None:
        radius = MATERIALS[_CLASS[name]].radius
        for _ in range(_TRIES):
            place = random.uniform(-_REACH, _REACH), y()
            if all(np.hypot(place[0] - a, place[1] - b) > radius + c for a, b, c in taken):
                taken.append((*place, radius))
                return place
        return None

    for _ in range(random.integers(1, 4)):
        if place := free_place("truck", lambda: random.uniform(-half_width + 1.3, half_width - 1.3)):
            size = [random.uniform(6, 9), 2.4, random.uniform(2.6, 3.4)]
            boxes.append(("truck", [*place, GROUND_Z + 1.9, *size, random.normal(0, 0.08)]))
    for _ in range(random.integers(3, 8)):
        if place := free_place("car", lambda: random.uniform(-half_width + 1, half_width - 1)):
            size = [random.uniform(3.6, 4.6), random.uniform(1.6, 1.9), 1.5]
            boxes.append(("car", [*place, GROUND_Z + 0.15 + 0.75, *size, random.normal(0, 0.08)]))
    for _ in range(random.integers(1, 4)):
        if place := free_place("barrier", lambda: either_side() * (half_width - 0.3)):
            boxes.append(("barrier", [*place, GROUND_Z + 0.45, random.uniform(2.5, 4), 0.25, 0.9, 0]))
    for _ in range(random.integers(4, 10)):
        if place := free_place("pedestrian", lambda: either_side() * random.uniform(half_width - 0.5, edge + 1)):
            radius, height = random.uniform(0.22, 0.34), random.uniform(1.5, 1.9)
            cylinders.append(("pedestrian", [*place, GROUND_Z + 0.15 + height / 2, radius, height]))
    for _ in range(random.integers(4, 9)):
        if place := free_place("pole", lambda: either_side() * (half_width + 0.3)):
            cylinders.append(("pole", [*place, GROUND_Z + 2.7, random.uniform(0.07, 0.14), 5.4]))
    for _ in range(random.integers(3, 8)):
        if place := free_place("trunk", lambda: either_side() * (edge + random.uniform(0.5, 1.8))):
            height, crown = random.uniform(1.8, 3), random.uniform(1, 1.9)
            cylinders.append(("trunk", [*place, GROUND_Z + height / 2, random.uniform(0.14, 0.3), height]))
            spheres.append(("crown", [*place, GROUND_Z + height + 0.8 * crown, crown]))

    names = [name for name, _ in (*boxes, *cylinders, *spheres)]
    base = np.array([MATERIALS[_CLASS[name]].color for name in ("road", "terrain", *names)])
    colors = base * random.uniform(0.8, 1.2, (len(base), 1)) + random.normal(0, 0.04, base.shape)
    heading, azimuth, elevation = random.uniform(-np.pi, np.pi), random.uniform(-np.pi, np.pi), random.uniform(0.5, 1.3)
    sun = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    tables = [
        np.array([row for _, row in part]).reshape(-1, size)
        for part, size in ((boxes, 7), (cylinders, 5), (spheres, 4))
    ]
    for table in tables:
        table[:, :3] = turned(table[:, :3], heading)
    tables[0][:, 6] += heading
    classes = np.array([_CLASS[name] for name in names])
    return Street(Solids(GROUND_Z, *tables), classes, colors.clip(0, 1), half_width, heading, sun)


def _surface(street: Street, hits: Hits, at: Float[np.ndarray, "R 3"]) -> tuple[np.ndarray, np.ndarray]:
    """Class of what every ray meets, 255 for the sky, and its row in `Street.colors`."""
    on_road = np.abs(turned(at, -street.heading)[:, 1]) < street.road_half_width
    ground = np.where(on_road, _CLASS["road"], _CLASS["terrain"])
    classes = np.where(hits.solid == 0, ground, street.solid_class[np.maximum(hits.solid, 1) - 1])
    classes[hits.solid < 0] = IGNORED
    row = np.where(hits.solid == 0, np.where(on_road, 0, 1), hits.solid + 1)
    return classes, row


def scan(street: Street, random: np.random.Generator) -> tuple[Float[np.ndarray, "N 4"], Int[np.ndarray, "N"]]:
    """One turn of the lidar: points with intensity, and their classes."""
    azimuth = np.arange(_NUM_AZIMUTHS) * (2 * np.pi / _NUM_AZIMUTHS) + random.uniform(0, 2 * np.pi)
    elevation, azimuth = (grid.ravel() for grid in np.meshgrid(np.deg2rad(_BEAMS_DEG), azimuth, indexing="ij"))
    rays = np.stack([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], 1)
    hits = cast(np.zeros(3), rays, street.solids)
    kept = (hits.solid >= 0) & (random.random(len(rays)) >= _DROPOUT)
    rays, hits = rays[kept], Hits(*(part[kept] for part in hits))
    classes, _ = _surface(street, hits, rays * hits.distance[:, None])
    reflectance = np.array([material.reflectance for material in MATERIALS])[classes]
    facing = np.abs((rays * hits.normal).sum(1))
    intensity = reflectance * (0.5 + 0.5 * facing) + random.normal(0, _INTENSITY_NOISE, len(rays))
    at = rays * (hits.distance + random.normal(0, _RANGE_NOISE, len(rays)))[:, None]
    return np.concatenate([at, intensity.clip(0, 1)[:, None]], 1).astype(np.float32), classes


def camera_pose(yaw_deg: float) -> Float[np.ndarray, "4 4"]:
    """`cam_from_lidar` of the camera that looks this way."""
    yaw = np.deg2rad(yaw_deg)
    rotation = np.array([[np.sin(yaw), -np.cos(yaw), 0], [0, 0, -1], [np.cos(yaw), np.sin(yaw), 0]])
    position = np.array([_CAMERA_FORWARD * np.cos(yaw), _CAMERA_FORWARD * np.sin(yaw), _CAMERA_UP])
    motion = np.eye(4)
    motion[:3, :3], motion[:3, 3] = rotation, -rotation @ position
    return motion


def photograph(
    street: Street, yaw_deg: float, random: np.random.Generator
) -> tuple[UInt8[np.ndarray, "H W 3"], Int[np.ndarray, "H W"]]:
    """A picture, and the class of every pixel, 255 for the sky."""
    motion = camera_pose(yaw_deg)
    rotation, origin = motion[:3, :3], -motion[:3, :3].T @ motion[:3, 3]
    rays = camera_rays(*IMAGE_SIZE, INTRINSICS, rotation).reshape(-1, 3)
    hits = cast(origin, rays, street.solids)
    at = origin + rays * hits.distance[:, None]
    classes, row = _surface(street, hits, at)
    height = rays[:, 2:].clip(0, 1)
    color = np.array([0.75, 0.82, 0.92]) * (1 - height) + np.array([0.35, 0.55, 0.85]) * height  # sky
    seen = hits.solid >= 0
    light = 0.45 + 0.55 * np.maximum(hits.normal @ street.sun, 0)
    albedo = street.colors[row[seen]] * _textures(street, hits, at, classes)[seen, None]
    color[seen] = albedo * light[seen, None]
    color = (color + random.normal(0, _PIXEL_NOISE, color.shape)).clip(0, 1)
    return (color * 255).round().astype(np.uint8).reshape(*IMAGE_SIZE, 3), classes.reshape(IMAGE_SIZE)


def _textures(street: Street, hits: Hits, at: Float[np.ndarray, "R 3"], classes: np.ndarray) -> np.ndarray:
    """Factor on the colour at every hit, from its place in the object's coordinates."""
    _, boxes, cylinders, spheres = street.solids
    centers = np.concatenate([[[0, 0, 0]], boxes[:, :3], cylinders[:, :3], spheres[:, :3]])
    yaws = np.concatenate([[street.heading], boxes[:, 6], np.zeros(len(cylinders) + len(spheres))])
    local = at - centers[hits.solid]
    cos, sin = np.cos(yaws[hits.solid]), np.sin(yaws[hits.solid])
    local = np.stack([cos * local[:, 0] + sin * local[:, 1], cos * local[:, 1] - sin * local[:, 0], local[:, 2]], 1)
    factor = np.ones(len(at))
    for number, material in enumerate(MATERIALS):
        chosen = classes == number
        factor[chosen] = material.texture(local[chosen])
    return factor


class Scene(NamedTuple):
    """One street as its sensors see it.

    Attributes:
        frame: Scan and pictures.
        pixel_classes: Class of every pixel of every picture, 255 for the sky.
    """

    frame: LidarCameraFrame
    pixel_classes: tuple[Int[np.ndarray, "H W"], ...]


def render_scene(seed: int, index: int, camera_yaws_deg: tuple[float, ...] = CAMERA_YAWS_DEG) -> Scene:
    """The scene with this index; the same with or without cameras."""
    random = np.random.default_rng([seed, index])
    street = make_street(random)
    points, labels = scan(street, random)
    cameras, classes = [], []
    for yaw_deg in camera_yaws_deg:
        image, of_pixels = photograph(street, yaw_deg, random)
        cameras.append(Camera(f"camera_{yaw_deg:g}", image, camera_pose(yaw_deg), INTRINSICS))
        classes.append(of_pixels)
    frame = LidarCameraFrame(points, labels, tuple(cameras), f"street_{seed}_{index}", SENSOR)
    return Scene(frame, tuple(classes))
