"""Labelled objects of evaluation images."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from ssl_distill.data.batch import DenseBatch

_INDICES_PER_IMAGE = 2**16  # more than there are classes


class LabelledObjectBatch(NamedTuple):
    """Evaluation images, the place of one object in each, and its class; otherwise a `LabelledBatch`.

    Attributes:
        image: RGB bytes at the evaluation size. An image with several objects occurs once for each.
        label: Class of the object, or -1 where the data set has none.
        index: Number of the object in its data set.
        mask: Pixels of the object.
    """

    image: UInt8[Tensor, "B 3 S S"]
    label: Int[Tensor, "B"]
    index: Int[Tensor, "B"]  # type: ignore[assignment]  # tuples have a method of this name
    mask: Bool[Tensor, "B S S"]


class LabelledObjects(NamedTuple):
    """All labelled objects of a batch.

    Attributes:
        source: The row of each object's image.
        label: As in `LabelledObjectBatch`.
        index: As in `LabelledObjectBatch`.
        mask: As in `LabelledObjectBatch`.
    """

    source: Int[Tensor, "M"]
    label: Int[Tensor, "M"]
    index: Int[Tensor, "M"]  # type: ignore[assignment]
    mask: Bool[Tensor, "M S S"]


def objects_of(batch: Any) -> LabelledObjects:
    """Objects of a `LabelledObjectBatch`, or of a `DenseBatch`: there all pixels of a class are one object.

    Raises:
        ValueError: If the batch is of another kind.
    """
    if isinstance(batch, LabelledObjectBatch):
        return LabelledObjects(torch.arange(len(batch.index), device=batch.index.device), *batch[1:])
    if isinstance(batch, DenseBatch):
        return _regions_of(batch)
    raise ValueError(
        f"objects are read from LabelledObjectBatch or DenseBatch, got {type(batch).__name__}; use FashionCollageData,"
        " CocoObjectsData, or ShapesData with `mode` scene."
    )


def _regions_of(batch: DenseBatch) -> LabelledObjects:
    """One object for each class but the background in each image."""
    pixels = batch.pixel_label.flatten(1)
    has = torch.zeros(len(pixels), int(pixels.max()) + 1, dtype=torch.bool, device=pixels.device)
    has.scatter_(1, pixels, value=True)
    source, label = has[:, 1:].nonzero().unbind(1)
    label = label + 1
    index = batch.index[source] * _INDICES_PER_IMAGE + label
    return LabelledObjects(source, label, index, batch.pixel_label[source] == label[:, None, None])
