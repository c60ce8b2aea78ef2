"""One view of every image, the image itself, and its negative control."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from ssl_distill.augment.base import ViewAugment
from ssl_distill.augment.color import normalize
from ssl_distill.augment.crops import as_floats, check_channels, cut_crops, whole_image
from ssl_distill.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD
from ssl_distill.data.batch import ImageBatch
from ssl_distill.draws import Draws
from ssl_distill.views import MultiCrop


class PlainAugment(ViewAugment[MultiCrop]):
    """The whole image as the only global crop, as evaluation sees it; nothing is random.

    Args:
        global_size: Height and width in pixels; images of another size are resized.
        mean: Of the channels in [0, 1]; subtracted last.
        std: Of the channels; divided by last.

    Source: random teachers (ICML 2023), section 3.
    """

    def __init__(
        self, global_size: int = 32, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ) -> None:
        super().__init__()
        if global_size < 1:
            raise ValueError(f"`global_size` must be at least 1 pixel, got {global_size}.")
        check_channels(mean, std)
        self.global_size = global_size
        self.mean = tuple(mean)
        self.std = tuple(std)

    def cut(self, batch: ImageBatch, draws: Draws) -> MultiCrop:
        """One crop per image (1, B, 3, S, S) and no local ones."""
        flip = torch.zeros(1, len(batch.index), dtype=torch.bool, device=batch.index.device)
        crops = cut_crops(batch.image, batch.source_size, whole_image(batch.source_size, flip), self.global_size)
        return MultiCrop(crops, crops[:0])

    def finish(self, views: MultiCrop, index: Int[Tensor, "B"], draws: Draws) -> MultiCrop:
        """Nothing happens to colours."""
        return MultiCrop(*(normalize(as_floats(crops), self.mean, self.std) for crops in views))


class NoiseAugment(PlainAugment):
    """Gaussian noise in the place of every image, the same whenever the image is seen: a negative control.

    What a method gains from it, such as a better scale of its features, it has not learned from pictures.

    Args:
        global_size: As in `PlainAugment`.
        mean: As in `PlainAugment`; for evaluation only.
        std: As in `PlainAugment`; for evaluation only.
    """

    def cut(self, batch: ImageBatch, draws: Draws) -> MultiCrop:
        """Crops without pixels."""
        nothing = torch.zeros(1, len(batch.index), 3, 0, 0, device=batch.index.device)
        return MultiCrop(nothing, nothing[:0])

    def finish(self, views: MultiCrop, index: Int[Tensor, "B"], draws: Draws) -> MultiCrop:
        """One crop of standard normal numbers per image."""
        shape = (3, self.global_size, self.global_size)
        uniform = Draws(draws.seed, epoch=0).uniform(index, 0, 2 * math.prod(shape))
        radius, angle = uniform.chunk(2, dim=1)
        noise = (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)  # Box and Muller
        crops = noise.unflatten(1, shape)[None]
        return MultiCrop(crops, crops[:0])
