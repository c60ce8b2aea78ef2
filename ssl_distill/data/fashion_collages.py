"""Collages of two Fashion-MNIST garments: small pictures of several objects, from real photographs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ssl_distill.data.batch import ObjectBatch
from ssl_distill.data.fashion_mnist import CLASS_NAMES, FashionMNISTData
from ssl_distill.data.fashion_mnist import SIZE as PADDED_SIZE
from ssl_distill.data.module import BatchSet, ImageData, ImageParts
from ssl_distill.data.object_labels import LabelledObjectBatch
from ssl_distill.draws import Draws

GARMENT = 28  # pixels; the photographs are read with a margin
CELL = 32  # each of the four quarters of a collage holds at most one garment
SIZE = 2 * CELL
OBJECTS = 2
_FAINTEST = 12  # of 255; what is darker is background


class FashionCollageData(ImageData):
    """Squares of 64 pixels with two garments each, in two of the four quarters, with boxes and pixel masks.

    Every collage is a function of (seed, number), so that none is ever stored. Training and bank show training
    garments, queries show test garments. Evaluation is per object: a collage occurs once for each of its garments.

    Args:
        root: Folder with Fashion-MNIST's files; see `FashionMNISTData`.
        num_images: Training collages.
        batch_size: Training collages per rank.
        num_workers: Loader processes.
        eval_batch_size: Objects per evaluation batch and rank.
        bank_size: Objects that evaluators learn from, of the first training collages.
        query_size: Objects that evaluators predict.
        seed: Of the collages and the order of training; None is the run's.
    """

    num_classes = len(CLASS_NAMES)
    class_names = CLASS_NAMES

    def __init__(
        self,
        root: str | None = None,
        num_images: int = 20_000,
        batch_size: int = 128,
        num_workers: int = 0,
        eval_batch_size: int = 500,
        bank_size: int = 10_000,
        query_size: int = 2_000,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, SIZE, SIZE, eval_batch_size, bank_size, query_size, seed)
        if num_images < 1:
            raise ValueError(f"`num_images` must be at least 1, got {num_images}.")
        self.garments = FashionMNISTData(root, bank_size=60_000, query_size=10_000, seed=seed)
        self.num_images = num_images

    def prepare_data(self) -> None:
        """Download where needed, on one rank."""
        self.garments.prepare_data()

    def load(self) -> ImageParts:
        """Read the garments; collages are made when they are asked for."""
        _, train_garments, test_garments, _ = self.garments.parts
        train = Collages(train_garments, self.seed, stream=0)
        test = Collages(test_garments, self.seed, stream=1)
        return ImageParts(
            BatchSet(train.object_batch, range(self.num_images)),
            BatchSet(train.labelled_batch, range(min(self.bank_size, OBJECTS * self.num_images))),
            BatchSet(test.labelled_batch, range(self.query_size)),
        )


class Drawn(NamedTuple):
    """Collages and what is known of them."""

    image: UInt8[Tensor, "B S S"]
    masks: Bool[Tensor, "B 2 S S"]
    labels: Int[Tensor, "B 2"]


class Collages:
    """Collages of the garments of one data set.

    Args:
        garments: Reads `LabelledBatch`es of padded garments.
        seed: With its number it decides a collage.
        stream: Different streams give different collages.
    """

    def __init__(self, garments: BatchSet, seed: int, stream: int) -> None:
        batch = garments.read(garments.positions)
        margin = (PADDED_SIZE - GARMENT) // 2
        inner = slice(margin, margin + GARMENT)
        self.images = batch.image[:, 0, inner, inner].clone()
        self.labels = batch.label
        self.seed = seed
        self.stream = stream

    def object_batch(self, positions: Sequence[int]) -> ObjectBatch:
        """Collages with boxes and masks."""
        index = torch.as_tensor(positions)
        drawn = self.draw(index)
        size = torch.full((len(index), 2), float(SIZE))
        count = torch.full((len(index),), OBJECTS)
        return ObjectBatch(_rgb(drawn.image), size, index, tight_boxes(drawn.masks), count, drawn.masks)

    def labelled_batch(self, positions: Sequence[int]) -> LabelledObjectBatch:
        """Collages with one of their garments each: number n is garment n % 2 of collage n // 2."""
        index = torch.as_tensor(positions)
        drawn = self.draw(index // OBJECTS)
        row, which = torch.arange(len(index)), index % OBJECTS
        return LabelledObjectBatch(_rgb(drawn.image), drawn.labels[row, which], index, drawn.masks[row, which])

    def draw(self, number: Int[Tensor, "B"]) -> Drawn:
        """The collages with these numbers."""
        uniform = Draws(self.seed, 0).uniform(number, self.stream, 4 + 2 * OBJECTS)
        total = len(self.images)
        first = (uniform[:, 0] * total).long()
        second = (first + 1 + (uniform[:, 1] * (total - 1)).long()) % total
        quarter = (uniform[:, 2] * 4).long()
        other = (quarter + 1 + (uniform[:, 3] * 3).long()) % 4
        garment, cell = torch.stack([first, second], dim=1), torch.stack([quarter, other], dim=1)  # (B, 2)
        shift = (uniform[:, 4:].view(-1, OBJECTS, 2) * (CELL - GARMENT + 1)).long()  # (B, 2, down and right)
        corner = CELL * torch.stack([cell // 2, cell % 2], dim=2) + shift

        placed = self.images.new_zeros(len(number), OBJECTS, SIZE, SIZE)
        pixels = corner[..., None] + torch.arange(GARMENT)  # (B, 2, 2, GARMENT)
        image, which = torch.arange(len(number)).view(-1, 1, 1, 1), torch.arange(OBJECTS).view(-1, 1, 1)
        placed[image, which, pixels[:, :, 0, :, None], pixels[:, :, 1, None, :]] = self.images[garment]
        return Drawn(placed.amax(1), placed >= _FAINTEST, self.labels[garment])


def _rgb(image: UInt8[Tensor, "B S S"]) -> UInt8[Tensor, "B 3 S S"]:
    return image[:, None].expand(-1, 3, -1, -1).contiguous()


def tight_boxes(masks: Bool[Tensor, "B M H W"]) -> Float[Tensor, "B M 4"]:
    """Smallest boxes around masks: left, top, right, bottom as fractions of width and height; 0 for empty masks."""
    height, width = masks.shape[-2:]
    in_columns, in_rows = masks.any(2).byte(), masks.any(3).byte()
    left, top = in_columns.argmax(-1), in_rows.argmax(-1)
    right, bottom = width - in_columns.flip(-1).argmax(-1), height - in_rows.flip(-1).argmax(-1)
    boxes = torch.stack([left / width, top / height, right / width, bottom / height], dim=-1)
    return boxes * masks.flatten(2).any(-1)[..., None]
