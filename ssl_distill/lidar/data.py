"""What all lidar data modules share: training samples, exact resume, whole scans for evaluation."""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from ssl_distill.data.corrupt import OnCorrupt, Replacement, Useless, check_on_corrupt
from ssl_distill.data.module import EvaluatedData
from ssl_distill.data.resume import resumed
from ssl_distill.data.sampler import EpochSampler
from ssl_distill.distributed import rank, world_size
from ssl_distill.draws import Draws
from ssl_distill.lidar.frames import Frames
from ssl_distill.lidar.preparation import Preparation
from ssl_distill.lidar.samples import PairedSamples, Samples, evaluation_scan, join_scans, sample_draws


class LidarParts(NamedTuple):
    """What is trained on, and what it is evaluated with.

    Attributes:
        train: Any frames.
        bank: Labelled frames that a probe learns from; None where there are no labels.
        queries: Labelled frames that it predicts; None where there are no labels.
    """

    train: Frames
    bank: Frames | None
    queries: Frames | None


def chosen(frames: Frames, positions: Sequence[int]) -> Frames:
    """Frames at some positions of others."""
    return Subset(cast(Any, frames), positions)


def spread(frames: Frames, count: int) -> Frames:
    """At most `count` frames, at equal distances: neighbours in time are alike."""
    if len(frames) <= count:
        return frames
    return chosen(frames, [i * len(frames) // count for i in range(count)])


class TrainingSet:
    """Samples by number of epoch and frame: item `epoch * len(frames) + position`.

    A frame that cannot be read, or that shows nothing to its cameras, is replaced by the next, named and counted.

    Args:
        frames: What is trained on.
        samples: How a frame becomes a sample.
        preparation: Sizes.
        seed: With epoch and position it decides every random number.
        on_corrupt: As in `Replacement`.
    """

    def __init__(
        self,
        frames: Frames,
        samples: Samples,
        preparation: Preparation,
        seed: int,
        on_corrupt: OnCorrupt = "skip",
    ) -> None:
        self.frames = frames
        self.samples = samples
        self.preparation = preparation
        self.seed = seed
        self.replacement = Replacement(len(frames), on_corrupt, "frames")

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, item: int) -> Any:
        """A batch of one."""
        epoch, asked_for = divmod(item, len(self.frames))
        return self.replacement.read(asked_for, lambda position: self._sample(epoch, position))[0]

    def _sample(self, epoch: int, position: int) -> Any:
        frame = self.frames[position]
        sample = self.samples.sample(frame, position, sample_draws(Draws(self.seed, epoch), position), self.preparation)
        if sample is None:
            raise Useless(
                f"frame {frame.frame_id} has nothing to train on: no picture with calibration, or no point in the field"
                f" of view {self.preparation.fov_min} to {self.preparation.fov_max}, in metres around the lidar"
            )
        return sample

    def __getitems__(self, items: Sequence[int]) -> Any:
        return self.samples.join([self[item] for item in items])


class EvaluationSet:
    """Whole scans by position, and batches of them; one that cannot be read is replaced by the next.

    Args:
        frames: What is evaluated.
        preparation: Sizes.
        on_corrupt: As in `Replacement`.
    """

    def __init__(self, frames: Frames, preparation: Preparation, on_corrupt: OnCorrupt = "skip") -> None:
        self.frames = frames
        self.preparation = preparation
        self.replacement = Replacement(len(frames), on_corrupt, "frames")

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, position: int) -> Any:
        """A batch of one."""
        return self.replacement.read(
            position, lambda used: evaluation_scan(self.frames[used], position, self.preparation)
        )[0]

    def __getitems__(self, positions: Sequence[int]) -> Any:
        return join_scans([self[position] for position in positions])


class LidarData(EvaluatedData):
    """Training samples from lidar frames, and labelled whole scans for evaluation.

    Training order and every random number are functions of (seed, epoch), for any number of workers, and a restored run
    continues them. `val_dataloader` gives bank and queries to a method, queries to a probe, nothing without labels.

    Args:
        samples: How a frame becomes a training sample; None is `PairedSamples()`, what ScaLR eats. `LabelledSamples`
            is for probes and fine-tuning.
        preparation: Field of view, grids and sizes; None is `Preparation()`. The grids are the network's own.
        batch_size: Training clouds per rank.
        num_workers: Loader processes.
        eval_batch_size: Scans per evaluation batch and rank.
        bank_size: Most scans that a method's probe learns from.
        query_size: Most scans that are predicted.
        seed: Of everything random; None is the run's.
        on_corrupt: "skip" names a frame once of which a file cannot be read, counts it and takes the next in its place,
            and stops when more than 10 frames and 1 % of all are unreadable; "error" stops at the first.

    Attributes:
        class_names: In the order of labels.
    """

    class_names: tuple[str, ...] = ()

    def __init__(
        self,
        samples: Samples | None,
        preparation: Preparation | None,
        batch_size: int,
        num_workers: int,
        eval_batch_size: int,
        bank_size: int,
        query_size: int,
        seed: int | None,
        on_corrupt: OnCorrupt = "skip",
    ) -> None:
        super().__init__(batch_size, num_workers, eval_batch_size, bank_size, query_size, seed)
        check_on_corrupt(on_corrupt)
        self.on_corrupt = on_corrupt
        self.samples = samples or PairedSamples()
        self.preparation = preparation or Preparation()
        self._parts: LidarParts | None = None

    @property
    def num_classes(self) -> int | None:
        """None without labels."""
        return len(self.class_names) or None

    @abstractmethod
    def load(self) -> LidarParts:
        """Find the frames, and divide them."""

    @property
    def parts(self) -> LidarParts:
        """Training, bank and query frames; found when first asked for."""
        if self._parts is None:
            train, bank, queries = self.load()
            self._parts = LidarParts(
                train,
                None if bank is None else spread(bank, self.bank_size),
                None if queries is None else spread(queries, self.query_size),
            )
        return self._parts

    def setup(self, stage: str) -> None:
        """Find the frames, and refuse a batch that is larger than the data set before anything is computed."""
        if stage == "fit":
            self._sampler(self.training_set())
        else:
            self.parts  # noqa: B018

    def training_set(self) -> TrainingSet:
        """All training samples of all epochs."""
        return TrainingSet(self.parts.train, self.samples, self.preparation, self.seed, self.on_corrupt)

    def train_dataloader(self) -> DataLoader:
        """Shuffled samples; of a restored run, those that were not trained on yet."""
        dataset = self.training_set()
        return self._loader(dataset, self.batch_size, resumed(self._sampler(dataset), self.trainer))

    def val_dataloader(self) -> list[DataLoader]:
        """Whole scans: bank, queries."""
        parts = [self.parts.bank if self.samples.needs_bank else None, self.parts.queries]
        loaders = []
        for frames in parts:
            if frames is not None:
                dataset = EvaluationSet(frames, self.preparation, self.on_corrupt)
                sampler = UnrepeatedDistributedSampler(dataset, world_size(), rank(), shuffle=False)
                loaders.append(self._loader(dataset, self.eval_batch_size, sampler))
        return loaders

    def calibration_batches(self, count: int) -> Iterator[Any]:
        """Training batches of an epoch that no run has, to see an untrained network's batch statistics with."""
        dataset = self.training_set()
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.seed)).tolist()
        for batch in range(count):
            items = [(batch * self.batch_size + i) % len(order) for i in range(self.batch_size)]
            yield dataset.__getitems__([len(dataset) * 2**20 + order[item] for item in items])

    def sample_images(self, count: int) -> list[Tensor]:
        """Pictures of training samples spread over the data set, (1, 3, H, W) each, for a teacher to be fitted to."""
        dataset = self.training_set()
        count = min(count, len(dataset))
        return [dataset[i * len(dataset) // count].images for i in range(count)]

    def _sampler(self, dataset: TrainingSet) -> EpochSampler:
        return EpochSampler(dataset, self.batch_size, self.seed, world_size(), rank())


def origin(frames: Frames, position: int) -> tuple[Frames, int]:
    """Where a frame of a data set comes from, whatever was chosen and joined on the way: frames, and position there."""
    source: Any = frames
    while isinstance(source, (Subset, ConcatDataset)):
        if isinstance(source, Subset):
            source, position = source.dataset, source.indices[position]
        else:
            part = bisect_right(source.cumulative_sizes, position)
            source, position = source.datasets[part], position - [0, *source.cumulative_sizes][part]
    return source, position


class MixedLidarData(LidarData):
    """Several data sets trained on together, their frames shuffled among each other without weights.

    Each keeps its own sensor's rules. Evaluation is on the first: classes differ between data sets.

    Args:
        members: The data sets; of each only the frames are taken.
        samples: As in `LidarData`.
        preparation: As in `LidarData`.
        batch_size: Training clouds per rank.
        num_workers: Loader processes.
        eval_batch_size: Scans per evaluation batch and rank.
        bank_size: Most scans that a method's probe learns from.
        query_size: Most scans that are predicted.
        seed: Of everything random; None is the run's.
        on_corrupt: As in `LidarData`.
    """

    def __init__(
        self,
        members: list[LidarData],
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
        if not members:
            raise ValueError("`members` must be one or more data sets, got none.")
        self.members = members

    def load(self) -> LidarParts:
        """The training frames of all, evaluation frames of the first."""
        loaded = [member.load() for member in self.members]
        self.class_names = self.members[0].class_names
        of_members = [member.training_files for member in self.members]
        self.training_files = (
            [f"{number}/{name}" for number, (names, _) in enumerate(of_members) for name in names],
            [file for _, files in of_members for file in files],
        )
        train: Any = ConcatDataset(cast(Any, [parts.train for parts in loaded]))
        return LidarParts(train, loaded[0].bank, loaded[0].queries)
