"""What evaluators read of a batch of images."""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ssl_distill.evaluate.features import Features, encode


class Reading(ABC):
    """Rows of features that an encoder gives for an evaluation batch, in one way or in several side by side.

    Attributes:
        names: Of the ways, the headline first; they end the names of scores. An empty name adds nothing.
    """

    names: tuple[str, ...]

    @abstractmethod
    def __call__(self, encoder: nn.Module, images: Float[Tensor, "B 3 H W"], batch: Any) -> tuple[Features, ...]:
        """Features of each way.

        Args:
            encoder: Left in the mode it was in.
            images: The batch's images as the encoder eats them.
            batch: As the data module yields it.
        """


class ImageReading(Reading):
    """One row for every image: what the encoder returns."""

    names = ("",)

    def __call__(self, encoder: nn.Module, images: Float[Tensor, "B 3 H W"], batch: Any) -> tuple[Features, ...]:
        """Features of whole images; arguments as in `Reading`."""
        return (Features(encode(encoder, images), batch.label, batch.index),)
