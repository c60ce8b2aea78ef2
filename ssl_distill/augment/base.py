"""What all augmentations are: pixels are cut first, colours are changed last."""

from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ssl_distill.draws import Draws

Views = TypeVar("Views")


class CutBatch(NamedTuple):
    """Views whose pixels were cut out already, by a loader process; their colours are still to be changed.

    Attributes:
        views: What `ViewAugment.cut` made.
        index: Position of each image in its data set.
    """

    views: Any
    index: Int[Tensor, "B"]  # type: ignore[assignment]  # tuples have a method of this name


class ViewAugment(nn.Module, ABC, Generic[Views]):
    """Images to views, in two halves.

    `cut` chooses where views lie and resizes them, once, from the pixels of the whole image. For images of many sizes
    a loader process does it, so that full resolution never leaves it; images of one size come whole and are cut on the
    device. `finish` changes colours and normalises, on the device.

    Both are functions of (seed, epoch, index): the same draws give an image the same views, whatever else is in the
    batch and wherever they are made.

    Attributes:
        mean: Of the channels in [0, 1]; subtracted last.
        std: Of the channels; divided by last.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @abstractmethod
    def cut(self, batch: Any, draws: Draws) -> Views:
        """Views in the images' own colours: bytes, or floats in [0, 1]."""

    @abstractmethod
    def finish(self, views: Views, index: Int[Tensor, "B"], draws: Draws) -> Views:
        """Normalised views."""

    @torch.no_grad()
    def forward(self, batch: Any, draws: Draws) -> Views:
        """Views of a batch.

        Args:
            batch: Images as bytes, such as an `ImageBatch`; or a `CutBatch`.
            draws: The random stream of the epoch.
        """
        with torch.autocast(batch.index.device.type, enabled=False):  # half precision would blur inexactly
            cut = batch if isinstance(batch, CutBatch) else CutBatch(self.cut(batch, draws), batch.index)
            return self.finish(cut.views, cut.index, draws)
