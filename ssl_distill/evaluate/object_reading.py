"""Objects as evaluators read them: with attention masked to each, and without."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ssl_distill.backbones.vit import VisionTransformer
from ssl_distill.data.object_labels import objects_of
from ssl_distill.evaluate.features import Features, encode
from ssl_distill.evaluate.object_tokens import object_features
from ssl_distill.evaluate.reading import Reading


class ObjectReading(Reading):
    """One row for every object: its class, and the class token that sees only its patches, or the whole image.

    Masks tell where the object is, so masked scores compare only with others that know as much. Unmasked, all objects
    of an image have the same features.

    Args:
        threshold: Share of a patch that must be exceeded for it to belong to an object.
    """

    names = ("masked", "unmasked")

    def __init__(self, threshold: float = 0.0) -> None:
        self.threshold = threshold

    def __call__(self, encoder: nn.Module, images: Float[Tensor, "B 3 H W"], batch: Any) -> tuple[Features, ...]:
        """Features of objects, masked and unmasked; arguments as in `Reading`.

        Raises:
            ValueError: If the batch tells of no objects, or the encoder cannot be masked.
        """
        if not isinstance(encoder, VisionTransformer):
            raise ValueError(
                f"`ObjectReading` needs plain ViTs, whose attention it masks, got {type(encoder).__name__}."
            )
        objects = objects_of(batch)
        masked = object_features(encoder, images[objects.source], objects.mask, self.threshold)
        unmasked = encode(encoder, images)[objects.source]
        return tuple(Features(rows, objects.label, objects.index) for rows in (masked, unmasked))
