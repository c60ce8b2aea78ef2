"""KITTI: the odometry sequences with SemanticKITTI's labels, and the object benchmark."""

import reprlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from ssl_distill.lidar.files import KITTI_COLUMNS, label_table, read_labels, read_points
from ssl_distill.lidar.frames import Camera, LidarCameraFrame, Sensor
from ssl_distill.lidar.projection import split_projection

SENSOR = Sensor(0.28613698, 0.14090556, min_depth=None, min_lidar_x=1.0)
TRAIN_SEQUENCES = ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10")
VAL_SEQUENCES = ("08",)
CLASSES: dict[str, tuple[int, ...]] = {  # name: raw labels; all others are ignored
    "car": (10, 252),
    "bicycle": (11,),
    "motorcycle": (15,),
    "truck": (18, 258),
    "other-vehicle": (13, 16, 20, 256, 257, 259),
    "person": (30, 254),
    "bicyclist": (31, 253),
    "motorcyclist": (32, 255),
    "road": (40, 60),
    "parking": (44,),
    "sidewalk": (48,),
    "other-ground": (49,),
    "building": (50,),
    "fence": (51,),
    "vegetation": (70,),
    "trunk": (71,),
    "terrain": (72,),
    "pole": (80,),
    "traffic-sign": (81,),
}
_LARGEST = 1e6  # number in a calibration: pixels or metres
_TABLE = label_table(list(CLASSES.values()))


class SemanticKITTI:
    """Scans of some sequences, with labels where there are any and the left colour camera where it lies beside.

    Args:
        root: Holds `dataset/sequences` or `sequences`.
        sequences: Two-digit names.
        every: Takes each so many-th scan of the sorted list, as in 1 % experiments.

    Raises:
        ValueError: If there is no scan, or a sequence has pictures and no calibration.
    """

    def __init__(self, root: str | Path, sequences: Sequence[str] = TRAIN_SEQUENCES, every: int = 1) -> None:
        root = Path(root).expanduser()
        folders = [root / "dataset" / "sequences", root / "sequences"]
        found = [folder for folder in folders if folder.is_dir()]
        if not found:
            raise ValueError(
                f"`root` must hold the sequences of KITTI, but neither {folders[0]} nor {folders[1]} exists."
            )
        if every < 1:
            raise ValueError(f"`every` must be at least 1, got {every}.")
        self.scans = [path for name in sequences for path in sorted((found[0] / name / "velodyne").glob("*.bin"))][
            ::every
        ]
        if not self.scans:
            raise ValueError(
                f"`root` {root} has no scans; looked for {found[0]}/SS/velodyne/*.bin, SS of {', '.join(sequences)}."
            )
        self._calibration = {
            folder.name: _camera_2(_calibration_file(root, folder), "Tr")
            for folder in {scan.parents[1] for scan in self.scans}
            if (folder / "image_2").is_dir()
        }

    @property
    def has_labels(self) -> bool:
        """Whether any sequence has labels of points."""
        return any((folder / "labels").is_dir() for folder in {scan.parents[1] for scan in self.scans})

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, position: int) -> LidarCameraFrame:
        scan = self.scans[position]
        sequence = scan.parents[1]
        points = read_points(scan, KITTI_COLUMNS)
        labels = None
        if (sequence / "labels").is_dir():
            labels = read_labels(sequence / "labels" / f"{scan.stem}.label", "<u4", _TABLE, len(points))
        cameras: tuple[Camera, ...] = ()
        if sequence.name in self._calibration:
            intrinsics, cam_from_lidar = self._calibration[sequence.name]
            cameras = (Camera("image_2", sequence / "image_2" / f"{scan.stem}.png", cam_from_lidar, intrinsics),)
        return LidarCameraFrame(points, labels, cameras, f"{sequence.name}/{scan.stem}", SENSOR)


class KITTIObject:
    """Scans and pictures of KITTI's object benchmark; there are no labels of points.

    Args:
        root: Holds `training/velodyne`, `training/image_2` and `training/calib`.

    Raises:
        ValueError: If there is no scan.
    """

    def __init__(self, root: str | Path) -> None:
        self.folder = Path(root).expanduser() / "training"
        self.scans = sorted((self.folder / "velodyne").glob("*.bin"))
        if not self.scans:
            raise ValueError(f"`root` must hold KITTI's object data, but {self.folder / 'velodyne'} has no *.bin.")

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, position: int) -> LidarCameraFrame:
        scan = self.scans[position]
        calibration = self.folder / "calib" / f"{scan.stem}.txt"
        intrinsics, cam_from_lidar = _camera_2(calibration, "Tr_velo_to_cam", "R0_rect")
        camera = Camera("image_2", self.folder / "image_2" / f"{scan.stem}.png", cam_from_lidar, intrinsics)
        return LidarCameraFrame(read_points(scan, KITTI_COLUMNS), None, (camera,), scan.stem, SENSOR)


def read_calibration(path: Path) -> dict[str, Float[np.ndarray, "_"]]:
    """Numbers of every line, by its name.

    Raises:
        ValueError: If the file is missing, or holds anything but names and numbers.
        OSError: If it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"the calibration {path} is missing; pictures are of no use without it.")
    try:
        lines = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines())
        return {name.strip(): np.array(values.split(), np.float64) for name, _, values in lines if values.strip()}
    except ValueError as error:
        raise ValueError(f"the calibration {path} must be lines of a name and numbers: {error}.") from error


def _calibration_file(root: Path, sequence: Path) -> Path:
    """Beside the sequence, or in the tree of its own that ScaLR's published code reads."""
    places = (sequence / "calib.txt", root / "calib" / "dataset" / "sequences" / sequence.name / "calib.txt")
    for place in places:
        if place.is_file():
            return place
    raise ValueError(
        f"sequence {sequence.name} has pictures and no calibration; looked for {places[0]} and {places[1]}."
    )


def _camera_2(path: Path, *motions: str) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, "4 4"]]:
    """Intrinsics and `cam_from_lidar` of the left colour camera.

    Args:
        path: Of the calibration.
        *motions: Names of 3 x 4 or 3 x 3 matrices from the lidar on, the first applied first.

    Raises:
        ValueError: If the file is missing or damaged, or lacks a matrix.
        OSError: If it cannot be read.
    """
    calibration = read_calibration(path)
    missing = [name for name in ("P2", *motions) if name not in calibration]
    if missing:
        raise ValueError(f"the calibration {path} lacks {' and '.join(missing)}; it has {', '.join(calibration)}.")
    for name in ("P2", *motions):
        values, sizes = calibration[name], (12,) if name == "P2" else (9, 12)
        if len(values) not in sizes or not (np.abs(values) < _LARGEST).all():
            raise ValueError(
                f"{name} in the calibration {path} must be {' or '.join(map(str, sizes))} numbers below"
                f" {_LARGEST:,.0f}, got {len(values)}: {reprlib.repr(values.tolist())}."
            )
    focal, last = calibration["P2"][[0, 5]], calibration["P2"][8:11]
    if focal.min() <= 0 or not np.array_equal(last, [0, 0, 1]):
        raise ValueError(
            f"P2 in the calibration {path} must have focal lengths above 0 and end with 0 0 1, got {focal.tolist()} and"
            f" {last.tolist()}."
        )
    intrinsics, cam_from_lidar = split_projection(calibration["P2"].reshape(3, 4))
    for name in reversed(motions):
        matrix = np.eye(4)
        values = calibration[name].reshape(3, -1)
        matrix[:3, : values.shape[1]] = values
        cam_from_lidar = cam_from_lidar @ matrix
    return intrinsics, cam_from_lidar
