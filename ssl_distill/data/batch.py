"""The kinds of batch that data modules yield."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

Images = UInt8[Tensor, "B C H W"] | list[Tensor]
"""Images as bytes: a stack of one size, or a list of (C, H, W) of any sizes, which does not leave its process."""

# A note on mypy: every tuple has a method `index`, which a field of that name hides.


def source_sizes(image: Images) -> Float[Tensor, "B 2"]:
    """Height and width of each image."""
    return torch.tensor([each.shape[-2:] for each in image], dtype=torch.float32)


class ImageBatch(NamedTuple):
    """Unlabelled training images, whole.

    Attributes:
        image: RGB bytes.
        source_size: Height and width in pixels; crops are drawn in these coordinates. A stack may have been stretched
            to another size.
        index: Position of each image in its data set; with the run's seed it decides every random draw.
    """

    image: Images
    source_size: Float[Tensor, "B 2"]
    index: Int[Tensor, "B"]  # type: ignore[assignment]


class ObjectBatch(NamedTuple):
    """Training images with the places of their objects, not their classes; otherwise an `ImageBatch`.

    Attributes:
        image: As in `ImageBatch`.
        source_size: As in `ImageBatch`.
        index: As in `ImageBatch`.
        boxes_xyxy: Left, top, right, bottom as fractions of the image's width and height; 0 beyond `num_objects`.
        num_objects: How many of the M places hold an object.
        masks: Pixels of each object that nothing hides, in the image stretched to S x S; False beyond `num_objects`.
    """

    image: Images
    source_size: Float[Tensor, "B 2"]
    index: Int[Tensor, "B"]  # type: ignore[assignment]
    boxes_xyxy: Float[Tensor, "B M 4"]
    num_objects: Int[Tensor, "B"]
    masks: Bool[Tensor, "B M S S"]


class LabelledBatch(NamedTuple):
    """Labelled images of one size: resized and centre-cropped for evaluation, or crops for training.

    Attributes:
        image: RGB bytes, or normalised floats.
        label: Class, or -1 where the data set has none.
        index: Position in the data set; lets evaluators drop a distributed sampler's duplicates.
    """

    image: UInt8[Tensor, "B 3 S S"] | Float[Tensor, "B 3 S S"]
    label: Int[Tensor, "B"]
    index: Int[Tensor, "B"]  # type: ignore[assignment]


class LabelledImages(NamedTuple):
    """Whole labelled images, to cut crops from; otherwise a `LabelledBatch`.

    Attributes:
        image: RGB bytes of any sizes.
        label: As in `LabelledBatch`.
        index: As in `LabelledBatch`.
    """

    image: list[Tensor]
    label: Int[Tensor, "B"]
    index: Int[Tensor, "B"]  # type: ignore[assignment]


class DenseBatch(NamedTuple):
    """Evaluation images with a class for every pixel.

    Attributes:
        image: RGB bytes at the evaluation size.
        pixel_label: Class of each pixel; 0 is background.
        index: Position in the data set.
    """

    image: UInt8[Tensor, "B 3 S S"]
    pixel_label: Int[Tensor, "B S S"]
    index: Int[Tensor, "B"]  # type: ignore[assignment]

    @property
    def label(self) -> Int[Tensor, "B"]:
        """-1, as where there are no labels: no class is the whole image's."""
        return torch.full_like(self.index, -1)
