"""nuScenes as a data module."""

from pathlib import Path

from ssl_distill.data.corrupt import OnCorrupt
from ssl_distill.lidar.data import LidarData, LidarParts, chosen
from ssl_distill.lidar.nuscenes import CLASSES, NuScenes, scene_names
from ssl_distill.lidar.preparation import Preparation
from ssl_distill.lidar.samples import Samples


class NuScenesData(LidarData):
    """nuScenes' key frames; labels are used where lidarseg is there.

    Args:
        root: Holds `samples` and the folder of tables.
        version: v1.0-trainval or v1.0-mini; the folder of tables.
        train_scenes: Text file with the training scenes, one per line; None is the official split, of trainval only
            with the nuscenes-devkit installed.
        val_scenes: The same for the scenes that are predicted.
        train_every: Trains on each so many-th key frame.
        samples: As in `LidarData`.
        preparation: As in `LidarData`.
        batch_size: Training clouds per rank.
        num_workers: Loader processes.
        eval_batch_size: Scans per evaluation batch and rank.
        bank_size: Most scans that a method's probe learns from.
        query_size: Most scans that are predicted; all, by default.
        seed: Of everything random; None is the run's.
        on_corrupt: As in `LidarData`.
    """

    def __init__(
        self,
        root: str,
        version: str = "v1.0-trainval",
        train_scenes: str | None = None,
        val_scenes: str | None = None,
        train_every: int = 1,
        samples: Samples | None = None,
        preparation: Preparation | None = None,
        batch_size: int = 8,
        num_workers: int = 4,
        eval_batch_size: int = 4,
        bank_size: int = 200,
        query_size: int = 10_000,
        seed: int | None = None,
        on_corrupt: OnCorrupt = "skip",
    ) -> None:
        sizes = (batch_size, num_workers, eval_batch_size, bank_size, query_size)
        super().__init__(samples, preparation, *sizes, seed, on_corrupt)
        if train_every < 1:
            raise ValueError(f"`train_every` must be at least 1, got {train_every}.")
        self.root = root
        self.version = version
        self.train_scenes = train_scenes
        self.val_scenes = val_scenes
        self.train_every = train_every

    def load(self) -> LidarParts:
        """Read the tables, or what the cache holds of them."""
        train_scenes = scene_names("train", self.version, self.train_scenes)
        frames = NuScenes(self.root, train_scenes, self.version)
        tables = sorted((Path(self.root).expanduser() / self.version).glob("*.json"))  # of names that are never reused
        self.training_files = [table.name for table in tables], [str(table) for table in tables]
        train = chosen(frames, range(0, len(frames), self.train_every))
        if not frames.has_labels:
            return LidarParts(train, None, None)
        self.class_names = tuple(CLASSES)
        val_scenes = scene_names("val", self.version, self.val_scenes)
        return LidarParts(train, train, NuScenes(self.root, val_scenes, self.version))
