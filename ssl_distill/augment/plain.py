"""One view of every image, the image itself, and its negative control."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ssl_distill.augment.color import normalize
from ssl_distill.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD
from ssl_distill.data.batch import ImageBatch
from ssl_distill.draws import Draws
from ssl_distill.views import MultiCrop


class PlainAugment(nn.Module):
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
        if min(std) <= 0:
            raise ValueError(f"`std` must be positive in every channel, got {std}.")
        self.global_size = global_size
        self.mean = tuple(mean)
        self.std = tuple(std)

    @torch.no_grad()
    def forward(self, batch: ImageBatch, draws: Draws) -> MultiCrop:
        """One crop per image (1, B, 3, S, S) and no local ones."""
        size = (self.global_size, self.global_size)
        images = batch.image.float() / 255
        if batch.image.shape[2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp_(0, 1)
        crops = normalize(images[None], self.mean, self.std)
        return MultiCrop(crops, crops[:0])


class NoiseAugment(PlainAugment):
    """Gaussian noise in the place of every image, the same whenever the image is seen: a negative control.

    What a method gains from it, such as a better scale of its features, it has not learned from pictures.

    Args:
        global_size: As in `PlainAugment`.
        mean: As in `PlainAugment`; for evaluation only.
        std: As in `PlainAugment`; for evaluation only.
    """

    @torch.no_grad()
    def forward(self, batch: ImageBatch, draws: Draws) -> MultiCrop:
        """One crop of standard normal numbers per image."""
        shape = (3, self.global_size, self.global_size)
        uniform = Draws(draws.seed, epoch=0).uniform(batch.index, 0, 2 * math.prod(shape))
        radius, angle = uniform.chunk(2, dim=1)
        noise = (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)  # Box and Muller
        crops = noise.unflatten(1, shape)[None]
        return MultiCrop(crops, crops[:0])
