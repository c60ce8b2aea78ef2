"""Generated streets as a data module: lidar, cameras and exact labels, nothing to download."""

from functools import partial

import numpy as np

from ssl_distill.cache import Arrays, cached
from ssl_distill.lidar.data import LidarData, LidarParts
from ssl_distill.lidar.frames import Camera, LidarCameraFrame
from ssl_distill.lidar.preparation import Preparation
from ssl_distill.lidar.samples import PairedSamples, Samples
from ssl_distill.lidar.street import (
    CAMERA_YAWS_DEG,
    CLASS_NAMES,
    IMAGE_SIZE,
    INTRINSICS,
    SENSOR,
    camera_pose,
    render_scene,
)

_FORMAT = 1  # to be raised when scenes change


class StreetFrames:
    """Scenes `first` to `first + count - 1`, rendered when asked for and kept in the user's cache folder.

    Args:
        seed: With a scene's number it decides everything.
        first: Number of the first.
        count: How many.
        camera_yaws_deg: Where the cameras look; none is faster.
    """

    def __init__(self, seed: int, first: int, count: int, camera_yaws_deg: tuple[float, ...] = CAMERA_YAWS_DEG) -> None:
        self.seed = seed
        self.first = first
        self.count = count
        self.camera_yaws_deg = camera_yaws_deg
        self._kept: dict[int, LidarCameraFrame] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> LidarCameraFrame:
        if position not in self._kept:
            self._kept[position] = self._load(self.first + position)
        return self._kept[position]

    def _load(self, number: int) -> LidarCameraFrame:
        key = {"format": _FORMAT, "seed": self.seed, "scene": number, "yaws": self.camera_yaws_deg}
        arrays = cached("street", key, partial(_render, self.seed, number, self.camera_yaws_deg))
        cameras = tuple(
            Camera(f"camera_{yaw_deg:g}", image, camera_pose(yaw_deg), INTRINSICS)
            for yaw_deg, image in zip(self.camera_yaws_deg, arrays["images"], strict=True)
        )
        return LidarCameraFrame(arrays["points"], arrays["labels"], cameras, f"street_{self.seed}_{number}", SENSOR)


def _render(seed: int, number: int, camera_yaws_deg: tuple[float, ...]) -> Arrays:
    frame = render_scene(seed, number, camera_yaws_deg).frame
    images = np.array([camera.image for camera in frame.cameras], np.uint8).reshape(-1, *IMAGE_SIZE, 3)
    assert frame.labels is not None
    return {"points": frame.points, "labels": frame.labels, "images": images}


class SynthStreetData(LidarData):
    """Streets of boxes, cylinders and spheres: 11 classes, a lidar of 24 beams, four cameras of 192 x 96 pixels.

    Scenes are functions of (seed, number). Probes learn from the first `bank_size` training scenes and predict the
    `query_size` after the training scenes.

    Args:
        num_scenes: Training scenes.
        samples: As in `LidarData`; None is `PairedSamples` with pictures as they are.
        preparation: As in `LidarData`; None fits the street: 32 m, cells of 1 m, voxels of 0.25 m.
        batch_size: Training clouds per rank.
        num_workers: Loader processes; scenes lie in memory, so 0 is fast.
        eval_batch_size: Scans per evaluation batch and rank.
        bank_size: Scans that a method's probe learns from.
        query_size: Scans that are predicted.
        seed: Of scenes, order and augmentation; None is the run's.
    """

    class_names = CLASS_NAMES

    def __init__(
        self,
        num_scenes: int = 120,
        samples: Samples | None = None,
        preparation: Preparation | None = None,
        batch_size: int = 4,
        num_workers: int = 0,
        eval_batch_size: int = 5,
        bank_size: int = 30,
        query_size: int = 40,
        seed: int | None = None,
    ) -> None:
        if num_scenes < 1:
            raise ValueError(f"`num_scenes` must be at least 1, got {num_scenes}.")
        super().__init__(
            samples or PairedSamples(IMAGE_SIZE),
            preparation or Preparation(((64, 64), (64, 24), (64, 24)), (-32, -32, -4), (32, 32, 8), voxel_size_m=0.25),
            batch_size,
            num_workers,
            eval_batch_size,
            bank_size,
            query_size,
            seed,
        )
        self.num_scenes = num_scenes

    def load(self) -> LidarParts:
        """Nothing is rendered yet."""
        train = StreetFrames(self.seed, 0, self.num_scenes)
        return LidarParts(train, train, StreetFrames(self.seed, self.num_scenes, self.query_size, ()))
