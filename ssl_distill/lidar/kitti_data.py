"""KITTI and SemanticKITTI as data modules."""

from collections.abc import Sequence
from pathlib import Path

from ssl_distill.data.corrupt import OnCorrupt
from ssl_distill.lidar.data import LidarData, LidarParts
from ssl_distill.lidar.preparation import Preparation
from ssl_distill.lidar.samples import Samples
from ssl_distill.lidar.semantic_kitti import CLASSES, TRAIN_SEQUENCES, VAL_SEQUENCES, KITTIObject, SemanticKITTI


class SemanticKITTIData(LidarData):
    """KITTI's odometry sequences; labels, pictures and calibration are used where they are.

    Args:
        root: Holds `dataset/sequences` or `sequences`.
        train_every: Trains on each so many-th scan: 100 for 1 %.
        train_sequences: Trained on.
        val_sequences: Predicted, where they have labels.
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
        train_every: int = 1,
        train_sequences: tuple[str, ...] = TRAIN_SEQUENCES,
        val_sequences: tuple[str, ...] = VAL_SEQUENCES,
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
        self.root = root
        self.train_every = train_every
        self.train_sequences = train_sequences
        self.val_sequences = val_sequences

    def load(self) -> LidarParts:
        """List the scans."""
        train = SemanticKITTI(self.root, self.train_sequences, self.train_every)
        self.training_files = _files(train.scans)
        if not train.has_labels:
            return LidarParts(train, None, None)
        self.class_names = tuple(CLASSES)
        return LidarParts(train, train, SemanticKITTI(self.root, self.val_sequences))


class KITTIObjectData(LidarData):
    """KITTI's object benchmark: pictures, no labels of points.

    Args:
        root: Holds `training/velodyne`, `training/image_2` and `training/calib`.
        samples: As in `LidarData`.
        preparation: As in `LidarData`.
        batch_size: Training clouds per rank.
        num_workers: Loader processes.
        seed: Of everything random; None is the run's.
        on_corrupt: As in `LidarData`.
    """

    def __init__(
        self,
        root: str,
        samples: Samples | None = None,
        preparation: Preparation | None = None,
        batch_size: int = 8,
        num_workers: int = 4,
        seed: int | None = None,
        on_corrupt: OnCorrupt = "skip",
    ) -> None:
        super().__init__(samples, preparation, batch_size, num_workers, 1, 1, 1, seed, on_corrupt)
        self.root = root

    def load(self) -> LidarParts:
        """List the scans."""
        train = KITTIObject(self.root)
        self.training_files = _files(train.scans)
        return LidarParts(train, None, None)


def _files(scans: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Sequence, folder and name of every scan, and the file."""
    return ["/".join(scan.parts[-3:]) for scan in scans], [str(scan) for scan in scans]
