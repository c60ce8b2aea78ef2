"""Collages of Fashion-MNIST garments as dense prediction and detection want them."""

from collections.abc import Sequence
from functools import partial

import torch
from torch.utils.data import Dataset

from ssl_distill.data.batch import DenseBatch
from ssl_distill.data.fashion_collages import SIZE, Collages, FashionCollageData, tight_boxes
from ssl_distill.data.fashion_mnist import CLASS_NAMES
from ssl_distill.data.module import BatchSet, ImageData, ImageParts
from ssl_distill.detection.data import Example

CLASSES = ("background", *CLASS_NAMES)


class DenseCollageData(ImageData):
    """The collages of `FashionCollageData`; in evaluation every pixel has a class, 0 for the background.

    Args:
        root: As in `FashionCollageData`, as are the others.
        num_images: Training collages.
        batch_size: Training collages per rank.
        num_workers: Loader processes.
        eval_batch_size: Collages per evaluation batch and rank.
        bank_size: Collages that evaluators learn from: the first training collages.
        query_size: Collages that evaluators predict, of test garments.
        seed: Of the collages and the order of training; None is the run's.
    """

    num_classes = len(CLASSES)
    class_names = CLASSES

    def __init__(
        self,
        root: str | None = None,
        num_images: int = 20_000,
        batch_size: int = 128,
        num_workers: int = 0,
        eval_batch_size: int = 100,
        bank_size: int = 2_000,
        query_size: int = 1_000,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, SIZE, SIZE, eval_batch_size, bank_size, query_size, seed)
        self.collages = FashionCollageData(root, num_images, batch_size, seed=seed)

    def prepare_data(self) -> None:
        """Download where needed, on one rank."""
        self.collages.prepare_data()

    def load(self) -> ImageParts:
        """Read the garments; collages are made when they are asked for."""
        train = self.collages.load().train
        bank, query = (partial(_dense_batch, _collages(self.collages, train=part)) for part in (True, False))
        return ImageParts(
            train,
            BatchSet(bank, range(min(self.bank_size, len(train)))),
            BatchSet(query, range(self.query_size)),
        )


class CollageScenes(Dataset):
    """Collages with a box and a mask of every garment.

    Args:
        count: How many.
        train: Collages of training garments, the first of those that methods are trained on; else of test garments.
        root: As in `FashionCollageData`.
        seed: Of the collages; None is the run's.
    """

    class_names = CLASSES

    def __init__(self, count: int, train: bool = True, root: str | None = None, seed: int | None = None) -> None:
        if count < 1:
            raise ValueError(f"`count` must be at least 1, got {count}.")
        self.count = count
        self.collages = _collages(FashionCollageData(root, seed=seed), train)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> Example:
        if item >= self.count:
            raise IndexError(item)
        drawn = self.collages.draw(torch.tensor([item]))
        boxes = tight_boxes(drawn.masks)[0] * SIZE
        target = {"boxes": boxes, "labels": drawn.labels[0] + 1, "masks": drawn.masks[0].byte()}
        return drawn.image.expand(3, -1, -1) / 255, target


def _collages(data: FashionCollageData, train: bool) -> Collages:
    """Those that `data` trains on, or those of its queries."""
    _, train_garments, test_garments, _ = data.garments.parts
    return Collages(train_garments if train else test_garments, data.seed, stream=0 if train else 1)


def _dense_batch(collages: Collages, positions: Sequence[int]) -> DenseBatch:
    index = torch.as_tensor(positions)
    drawn = collages.draw(index)
    pixel_label = (drawn.masks * (drawn.labels + 1)[:, :, None, None]).amax(1)  # garments do not overlap
    return DenseBatch(drawn.image[:, None].expand(-1, 3, -1, -1).contiguous(), pixel_label, index)
