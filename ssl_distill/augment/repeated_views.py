"""Views that come again."""

from typing import Any

from jaxtyping import Int
from torch import Tensor

from ssl_distill.augment.base import ViewAugment
from ssl_distill.draws import Draws


class RepeatedViews(ViewAugment[Any]):
    """The views of the first few epochs, again and again, so that what was computed of them can be kept.

    Args:
        augment: Makes the views.
        num_epochs: Epochs until they come again.
    """

    def __init__(self, augment: ViewAugment, num_epochs: int = 1) -> None:
        super().__init__()
        if num_epochs < 1:
            raise ValueError(f"`num_epochs` must be at least 1, got {num_epochs}.")
        self.augment: Any = augment
        self.num_epochs = num_epochs
        self.global_size = self.augment.global_size
        self.mean, self.std = self.augment.mean, self.augment.std

    def cut(self, batch: Any, draws: Draws) -> Any:
        """Views in the images' own colours, as in the epoch that is repeated."""
        return self.augment.cut(batch, self._repeated(draws))

    def finish(self, views: Any, index: Int[Tensor, "B"], draws: Draws) -> Any:
        """Views as in the epoch that is repeated."""
        return self.augment.finish(views, index, self._repeated(draws))

    def _repeated(self, draws: Draws) -> Draws:
        return draws._replace(epoch=draws.epoch % self.num_epochs)
