"""nuScenes, from its JSON tables; its devkit is not needed."""

import os
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ssl_distill.cache import Arrays, cached
from ssl_distill.data.files import read_json
from ssl_distill.lidar.files import NUSCENES_COLUMNS, label_table, read_labels, read_points
from ssl_distill.lidar.frames import Camera, LidarCameraFrame, Sensor
from ssl_distill.lidar.projection import inverse_pose, pose

SENSOR = Sensor(18.742355, 22.04632)
CLASSES: dict[str, tuple[str, ...]] = {  # name: categories; all others are ignored
    "barrier": ("movable_object.barrier",),
    "bicycle": ("vehicle.bicycle",),
    "bus": ("vehicle.bus.bendy", "vehicle.bus.rigid"),
    "car": ("vehicle.car",),
    "construction_vehicle": ("vehicle.construction",),
    "motorcycle": ("vehicle.motorcycle",),
    "pedestrian": (
        "human.pedestrian.adult",
        "human.pedestrian.child",
        "human.pedestrian.construction_worker",
        "human.pedestrian.police_officer",
    ),
    "traffic_cone": ("movable_object.trafficcone",),
    "trailer": ("vehicle.trailer",),
    "truck": ("vehicle.truck",),
    "driveable_surface": ("flat.driveable_surface",),
    "other_flat": ("flat.other",),
    "sidewalk": ("flat.sidewalk",),
    "terrain": ("flat.terrain",),
    "manmade": ("static.manmade",),
    "vegetation": ("static.vegetation",),
}
MINI_SCENES = {
    "train": ("0061", "0553", "0655", "0757", "0796", "1077", "1094", "1100"),
    "val": ("0103", "0916"),
}
_LIDAR = "LIDAR_TOP"
_TABLES = {  # what is read of each, and what it must be
    "scene": {"token": "text", "name": "text"},
    "sample": {"token": "text", "scene_token": "text", "timestamp": "a number"},
    "sample_data": {
        "token": "text",
        "sample_token": "text",
        "ego_pose_token": "text",
        "calibrated_sensor_token": "text",
        "filename": "text",
        "is_key_frame": "true or false",
    },
    "calibrated_sensor": {
        "token": "text",
        "sensor_token": "text",
        "rotation": "4 numbers",
        "translation": "3 numbers",
        "camera_intrinsic": "3 x 3 numbers, or none",
    },
    "ego_pose": {"token": "text", "rotation": "4 numbers", "translation": "3 numbers"},
    "sensor": {"token": "text", "channel": "text", "modality": "text"},
}
_OPTIONAL_TABLES = {"lidarseg": {"sample_data_token": "text", "filename": "text"}, "category": {"name": "text"}}
_LARGEST = 1e16  # number in a table: metres, pixels, or a time in microseconds
_FRAME_COLUMNS = ("token", "scene", "lidar", "lidarseg", "image", "cam_from_lidar", "intrinsics")
_INDEX_FORMAT = 1


class NuScenes:
    """Key frames of some scenes, with labels where lidarseg is there.

    The tables are read once; what is needed of them is kept in the user's cache folder.

    Args:
        root: Holds `samples`, and a folder of tables named by the version.
        scenes: Names such as scene-0061.
        version: v1.0-trainval, v1.0-mini or v1.0-test.

    Raises:
        ValueError: If a table or a camera is missing, or no scene is found.
    """

    def __init__(self, root: str | Path, scenes: Sequence[str], version: str = "v1.0-trainval") -> None:
        self.root = Path(root).expanduser()
        tables = self.root / version
        if not tables.is_dir():
            raise ValueError(f"`root` must hold the tables of nuScenes, but {tables} does not exist.")
        stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(tables.glob("*.json"))]
        key = {"format": _INDEX_FORMAT, "tables": str(tables.resolve()), "stamps": stamps}
        index = cached("nuscenes", key, lambda: _read_tables(tables))
        chosen = np.isin(index["scene"], list(scenes))
        if not chosen.any():
            there = np.unique(index["scene"])
            raise ValueError(
                f"`root` {self.root} has no key frame of the {len(scenes)} scenes looked for ({_some(scenes)});"
                f" {tables.name} has {len(there)} ({_some(there.tolist())})."
            )
        self.channels = index["channel"]
        self._table: Int[np.ndarray, V] = index["label_table"]
        self._rows = {name: index[name][chosen] for name in _FRAME_COLUMNS}

    @property
    def has_labels(self) -> bool:
        """Whether the release has labels of points, and the files of the first frame are there."""
        first = str(self._rows["lidarseg"][0])
        return bool(first) and (self.root / first).exists()

    def __len__(self) -> int:
        return len(self._rows["scene"])

    def __getitem__(self, position: int) -> LidarCameraFrame:
        row = {name: column[position] for name, column in self._rows.items()}
        points = read_points(self.root / str(row["lidar"]), NUSCENES_COLUMNS)
        labels = None
        if self.has_labels:
            labels = read_labels(self.root / str(row["lidarseg"]), np.uint8, self._table, len(points))
        cameras = tuple(
            Camera(str(name), self.root / str(row["image"][i]), row["cam_from_lidar"][i], row["intrinsics"][i])
            for i, name in enumerate(self.channels)
        )
        return LidarCameraFrame(points, labels, cameras, str(row["token"]), SENSOR)


def scene_names(split: str, version: str, scene_list: str | Path | None = None) -> list[str]:
    """Scenes of "train" or "val".

    Args:
        split: Which.
        version: As for `NuScenes`.
        scene_list: A text file with a name in each line; None is the official split: of mini from here, of trainval
            from the devkit, if it is installed.

    Raises:
        ValueError: If there is neither list nor devkit.
    """
    if scene_list is not None:
        path = Path(scene_list).expanduser()
        if not path.is_file():
            raise ValueError(f"`{split}_scenes` must be a text file with names of scenes, {path} does not exist.")
        return path.read_text(encoding="utf-8").split()
    if version == "v1.0-mini":
        return [f"scene-{number}" for number in MINI_SCENES[split]]
    try:
        from nuscenes.utils import splits
    except ImportError as error:
        raise ValueError(
            f"`{split}_scenes` must be a text file with the {split} scenes of {version}, one per line; without it the"
            " nuscenes-devkit is asked: run `pip install 'ssl-distill[nuscenes]'`."
        ) from error
    return list(getattr(splits, split))


def _read_tables(folder: Path) -> Arrays:
    """Columns with a row per key frame, in the order of scene and time; and the table of labels.

    Raises:
        ValueError: If a table is missing or damaged, or names what another has not.
    """
    try:
        return _joined(folder)
    except KeyError as error:
        raise ValueError(f"a table in {folder} refers to {error}, which is in no other; copy them again.") from error


def _joined(folder: Path) -> Arrays:
    scene, sample, sample_data, calibration, ego_pose, sensor = (_read(folder, name) for name in _TABLES)
    scene_name = {row["token"]: row["name"] for row in scene}
    modality = {row["token"]: (row["channel"], row["modality"]) for row in sensor}
    calibrated = {row["token"]: row for row in calibration}
    key_frames: dict[str, dict[str, Any]] = {}
    for row in sample_data:
        if row["is_key_frame"]:
            channel, _ = modality[calibrated[row["calibrated_sensor_token"]]["sensor_token"]]
            key_frames.setdefault(row["sample_token"], {})[channel] = row
    needed = {row["ego_pose_token"] for channels in key_frames.values() for row in channels.values()}
    ego = {row["token"]: row for row in ego_pose if row["token"] in needed}
    channels = sorted(channel for channel, kind in modality.values() if kind == "camera")
    lidarseg = {row["sample_data_token"]: row["filename"] for row in _read(folder, "lidarseg")}

    def global_from_sensor(row: dict[str, Any]) -> Float[np.ndarray, "4 4"]:
        there, mounted = ego[row["ego_pose_token"]], calibrated[row["calibrated_sensor_token"]]
        return pose(there["rotation"], there["translation"]) @ pose(mounted["rotation"], mounted["translation"])

    rows = []
    for each in sorted(sample, key=lambda row: (scene_name[row["scene_token"]], row["timestamp"])):
        found = key_frames.get(each["token"], {})
        missing = [channel for channel in (_LIDAR, *channels) if channel not in found]
        if missing:
            raise ValueError(f"sample {each['token']} in {folder} has no key frame of {', '.join(missing)}.")
        lidar, cameras = found[_LIDAR], [found[channel] for channel in channels]
        lidar_pose = global_from_sensor(lidar)
        rows.append(
            {
                "token": each["token"],
                "scene": scene_name[each["scene_token"]],
                "lidar": lidar["filename"],
                "lidarseg": lidarseg.get(lidar["token"], ""),
                "image": [camera["filename"] for camera in cameras],
                # Order matters: two poses of the car, some 50 ms apart, between the two sensors.
                "cam_from_lidar": [inverse_pose(global_from_sensor(camera)) @ lidar_pose for camera in cameras],
                "intrinsics": [
                    _intrinsics(folder, calibrated[camera["calibrated_sensor_token"]]) for camera in cameras
                ],
            }
        )
    if not rows:
        raise ValueError(f"`root` must hold nuScenes, but {folder / 'sample.json'} has no samples.")
    columns = {name: np.array([row[name] for row in rows]) for name in _FRAME_COLUMNS}
    return {**columns, "channel": np.array(channels), "label_table": _category_table(folder)}


def _category_table(folder: Path) -> Int[np.ndarray, "V"]:
    """By name of category, never by a fixed number: releases number them differently."""
    number = {row["name"]: row["index"] for row in _read(folder, "category") if "index" in row}
    wrong = [name for name, index in number.items() if type(index) is not int or not 0 <= index < 2**16]
    if wrong:
        raise ValueError(
            f"{folder / 'category.json'}: `index` of {wrong[0]} must be a whole number from 0 to 65535, got"
            f" {reprlib.repr(number[wrong[0]])}."
        )
    return label_table([[number[name] for name in names if name in number] for names in CLASSES.values()])


def _intrinsics(folder: Path, calibration: dict[str, Any]) -> list[list[float]]:
    matrix: list[list[float]] = calibration["camera_intrinsic"]
    if not matrix or min(matrix[0][0], matrix[1][1]) <= 0:
        raise ValueError(
            f"{folder / 'calibrated_sensor.json'}: `camera_intrinsic` of {calibration['token']}, a camera's, must have"
            f" focal lengths above 0, got {reprlib.repr(matrix)}."
        )
    return matrix


def _read(folder: Path, table: str) -> list[dict[str, Any]]:
    """Rows of a table, whose columns are checked; none where an optional one is not there.

    Raises:
        ValueError: If it is missing, or a row lacks something.
    """
    path = folder / f"{table}.json"
    if not os.path.exists(path):
        if table in _OPTIONAL_TABLES:
            return []
        raise ValueError(f"`root` must hold all tables of nuScenes, {path} does not exist.")
    rows: list[dict[str, Any]] = read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} must be a list of rows, got {reprlib.repr(rows)}.")
    columns = {**_TABLES, **_OPTIONAL_TABLES}[table]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number} must be an object, got {reprlib.repr(row)}.")
        for name, kind in columns.items():
            if not _KINDS[kind](row.get(name)):
                raise ValueError(f"{path}: `{name}` of row {number} must be {kind}, got {reprlib.repr(row.get(name))}.")
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and -_LARGEST < value < _LARGEST


def _are_numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(_is_number, value))


_KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "a number": _is_number,
    "true or false": lambda value: isinstance(value, bool),
    "3 numbers": lambda value: _are_numbers(value, 3),
    "4 numbers": lambda value: _are_numbers(value, 4),
    "3 x 3 numbers, or none": lambda value: (
        value == [] or (isinstance(value, list) and len(value) == 3 and all(_are_numbers(row, 3) for row in value))
    ),
}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)
