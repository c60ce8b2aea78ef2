"""What all image data modules share: loaders, exact resume, evaluation subsets."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from ssl_distill.augment.base import CutBatch, ViewAugment
from ssl_distill.augment.crops import cut_crops, whole_image
from ssl_distill.data.changes import changes, fingerprint
from ssl_distill.data.loader_process import outlive_requests
from ssl_distill.data.resume import resumed
from ssl_distill.data.sampler import EpochSampler
from ssl_distill.distributed import rank, world_size
from ssl_distill.draws import Draws, run_seed


class BatchSet:
    """A data set that is read batch by batch: `DataLoader` hands over all positions of a batch at once.

    Args:
        read: Positions to a batch.
        positions: What of the images belongs to the set.
    """

    def __init__(self, read: Callable[[Sequence[int]], Any], positions: Sequence[int]) -> None:
        self.read = read
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int) -> Any:
        """A batch of one image."""
        return self.read([self.positions[item]])

    def __getitems__(self, items: Sequence[int]) -> Any:
        return self.read([self.positions[item] for item in items])


class TrainingSet:
    """Training batches, by the items of an `EpochSampler`.

    Args:
        images: Read as batches whose `image` is a stack of one size, or a list of any sizes.
        shape: What becomes of a batch of images of any sizes, in the loader process.
    """

    def __init__(self, images: BatchSet, shape: Callable[[Any, Draws], Any]) -> None:
        self.images = images
        self.shape = shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, items: Sequence[int]) -> Any:
        batch = self.images.__getitems__([item % len(self) for item in items])
        if isinstance(batch.image, Tensor):
            return batch
        return self.shape(batch, Draws(run_seed(), items[0] // len(self)))


class Cut:
    """Views cut from whole images by a method's augmentation: nothing but what it needs leaves the loader process.

    Args:
        augment: Makes the views.
    """

    def __init__(self, augment: ViewAugment) -> None:
        self.augment = augment

    def __call__(self, batch: Any, draws: Draws) -> CutBatch:
        """A batch whose views are cut."""
        return CutBatch(self.augment.cut(batch, draws), batch.index)


class Squashed:
    """Whole images squashed to squares, for an augmentation that cuts on the device itself.

    Args:
        size: Side of the squares in pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, batch: Any, draws: Draws) -> Any:
        """A batch of one stack."""
        flip = torch.zeros(1, len(batch.image), dtype=torch.bool)
        (squares,) = cut_crops(batch.image, batch.source_size, whole_image(batch.source_size, flip), self.size)
        return batch._replace(image=squares)


def in_loader(augment: Any, decode_size: int) -> Callable[[Any, Draws], Any]:
    """What a loader process makes of images of any sizes: views, if they are made in two halves, or else squares."""
    return Cut(augment) if isinstance(augment, ViewAugment) else Squashed(decode_size)


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Refuse sizes below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


class EvaluatedData(LightningDataModule, ABC):
    """What data modules of images and of lidar frames share: sizes, the seed, and loaders of whole batches.

    Args:
        batch_size: Training samples per rank.
        num_workers: Loader processes; 0 reads in the training process.
        eval_batch_size: Evaluation samples per batch and rank.
        bank_size: Most samples that evaluators learn from.
        query_size: Most samples that evaluators predict.
        seed: Of everything random about the data; None is the run's, as `seed_everything` left it.

    Attributes:
        training_files: Names of what is trained on, the same wherever the data lie, and the file of each; none where
            data are made. Known after `setup`.
    """

    training_files: tuple[Sequence[str], Sequence[str]] = ((), ())

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        eval_batch_size: int,
        bank_size: int,
        query_size: int,
        seed: int | None,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
        check_sizes({**sizes, "bank_size": bank_size, "query_size": query_size})
        if num_workers < 0:
            raise ValueError(f"`num_workers` must be at least 0, got {num_workers}.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.eval_batch_size = eval_batch_size
        self.bank_size = bank_size
        self.query_size = query_size
        self._seed = seed
        self._fingerprint: Tensor | None = None

    @property
    def seed(self) -> int:
        """What everything random about the data follows from."""
        return run_seed() if self._seed is None else self._seed

    def state_dict(self) -> dict[str, Any]:
        """What the files were, for a run that goes on."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(*self.training_files)
        return {"training_files": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say which files have changed; a run goes on with the data as they are."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        changed = changes(state_dict["training_files"], self.state_dict()["training_files"], self.training_files[0])
        if changed:
            rank_zero_warn(
                f"the training files have changed since the checkpoint: {changed}. The run goes on with them as they"
                " are, not as it would have with the old ones."
            )

    def _loader(self, dataset: Any, batch_size: int, sampler: Any = None) -> DataLoader:
        """A loader of a data set that makes whole batches itself."""
        return DataLoader(
            dataset,
            batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=outlive_requests,
        )


def _as_is(batch: Any) -> Any:
    return batch


class ImageParts(NamedTuple):
    """What is trained on, and what it is evaluated with.

    Attributes:
        train: Read as batches without labels.
        bank: Labelled batches that evaluators learn from.
        queries: Labelled batches that evaluators predict.
        labelled: The bank with whole images, to train on with their labels; None where its images are whole already.
    """

    train: BatchSet
    bank: BatchSet
    queries: BatchSet
    labelled: BatchSet | None = None


class ImageData(EvaluatedData):
    """Training batches without labels, and a labelled bank and queries for evaluation.

    Training order is a function of (seed, epoch), the same for any number of workers and ranks, and a restored run
    continues it in mid-epoch. `val_dataloader` gives two loaders: bank, queries.

    Args:
        batch_size: Training images per rank; an epoch's incomplete last batch is left out.
        num_workers: Loader processes; 0 reads in the training process.
        decode_size: Side in pixels of the squares that an `augment` of one's own gets, if it is no `ViewAugment`.
        eval_size: Side in pixels of evaluation images.
        eval_batch_size: Images per evaluation batch and rank.
        bank_size: Most images that evaluators learn from.
        query_size: Most images that evaluators predict.
        seed: Of the order of training images; None is the run's, as `seed_everything` left it.

    Attributes:
        num_classes: None without labels; known after `setup`.
        class_names: Their names, in the order of labels.
        augment: Outside a Trainer, what views are cut for in loader processes, such as a `MultiCropAugment`. In a
            Trainer it is the method's.
    """

    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    augment: Any = None

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        decode_size: int,
        eval_size: int,
        eval_batch_size: int,
        bank_size: int,
        query_size: int,
        seed: int | None,
    ) -> None:
        super().__init__(batch_size, num_workers, eval_batch_size, bank_size, query_size, seed)
        check_sizes({"decode_size": decode_size, "eval_size": eval_size})
        self.decode_size = decode_size
        self.eval_size = eval_size
        self._parts: ImageParts | None = None

    @abstractmethod
    def load(self) -> ImageParts:
        """Find the images, or make them, and divide them."""

    def setup(self, stage: str) -> None:
        """Load, once, and refuse a batch that is larger than the data set before anything is computed."""
        if stage == "fit":
            self.sampler(self.parts.train, self.batch_size)
        else:
            self.parts  # noqa: B018

    @property
    def parts(self) -> ImageParts:
        """Training, bank and query images; loaded when first asked for."""
        if self._parts is None:
            self._parts = self.load()
        return self._parts

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches without labels; of a restored run, those that were not trained on yet."""
        return self.training_loader(self.parts.train, self.batch_size, self.trainer)

    def training_loader(self, images: BatchSet, batch_size: int, trainer: Trainer | None) -> DataLoader:
        """Shuffled batches of images, shaped for what the trainer trains.

        Args:
            images: What is trained on.
            batch_size: Images per rank.
            trainer: None shapes them for `augment`.
        """
        augment = getattr(trainer.lightning_module, "augment", None) if trainer else self.augment
        dataset = TrainingSet(images, in_loader(augment, self.decode_size))
        return self._loader(dataset, batch_size, resumed(self.sampler(images, batch_size), trainer))

    def val_dataloader(self) -> list[DataLoader]:
        """Labelled batches: bank, queries."""
        return [self._loader(part, self.eval_batch_size) for part in (self.parts.bank, self.parts.queries)]

    def sampler(self, images: BatchSet, batch_size: int) -> EpochSampler:
        """The order of training images of this rank.

        Raises:
            ValueError: If there are fewer than one global batch.
        """
        return EpochSampler(images, batch_size, self.seed, world_size(), rank())
