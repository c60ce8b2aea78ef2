"""Two views of every image, with their geometry."""

import torch
from torch import nn

from ssl_distill.augment.checks import check_probability, check_range
from ssl_distill.augment.color import DRAWS_PER_COLOR, ColorRecipe
from ssl_distill.augment.cut import cut_views
from ssl_distill.augment.geometry import DRAWS_PER_CROP, sample_crops, to_squashed
from ssl_distill.augment.multi_crop import GLOBAL_1, GLOBAL_2, IMAGENET_MEAN, IMAGENET_STD
from ssl_distill.data.batch import ImageBatch
from ssl_distill.draws import Draws
from ssl_distill.views import TwoViews


class TwoViewAugment(nn.Module):
    """Two crops of every image, each with colours of its own recipe. The defaults are BYOL's.

    Deviation: crops are resampled by an antialiased cubic filter, as everywhere here, not by a linear one.

    Args:
        global_size: Height and width of the views in pixels.
        scale: Smallest and largest area of a view as a share of the image.
        ratio: Smallest and largest width over height of a view in the original image.
        flip_probability: Share of views that are mirrored left to right.
        recipe_1: Colours of first views.
        recipe_2: Colours of second views.
        mean: Of the channels in [0, 1]; subtracted last.
        std: Of the channels; divided by last.

    Source: BYOL (arXiv 2006.07733), appendix B, as in PCD's official code.
    """

    def __init__(
        self,
        global_size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_probability: float = 0.5,
        recipe_1: ColorRecipe = GLOBAL_1,
        recipe_2: ColorRecipe = GLOBAL_2,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if global_size < 1:
            raise ValueError(f"`global_size` must be at least 1 pixel, got {global_size}.")
        check_range("scale", scale, most=1)
        check_range("ratio", ratio)
        check_probability("flip_probability", flip_probability)
        if min(std) <= 0:
            raise ValueError(f"`std` must be positive in every channel, got {std}.")
        self.global_size = global_size
        self.scale = scale
        self.ratio = ratio
        self.flip_probability = flip_probability
        self.recipe_1 = recipe_1
        self.recipe_2 = recipe_2
        self.mean = mean
        self.std = std

    @torch.no_grad()
    def forward(self, batch: ImageBatch, draws: Draws) -> TwoViews:
        """Views of a batch; the same draws give an image the same views, whatever else is in the batch."""
        with torch.autocast(batch.image.device.type, enabled=False):  # half precision would blur inexactly
            count = DRAWS_PER_CROP + DRAWS_PER_COLOR
            uniform = draws.uniform(batch.index, 0, 2 * count).unflatten(1, (2, count)).transpose(0, 1)
            crop_draws, color_draws = uniform.split([DRAWS_PER_CROP, DRAWS_PER_COLOR], dim=-1)  # (2, B, draws)
            source_size = batch.source_size.float().repeat(2, 1)  # a trainer in float64 converts batches
            boxes, flip = sample_crops(
                source_size, crop_draws.flatten(0, 1), self.scale, self.ratio, self.flip_probability
            )
            squashed = to_squashed(boxes, source_size, (batch.image.shape[2], batch.image.shape[3]))
            squashed, boxes, flip = (each.unflatten(0, (2, -1)) for each in (squashed, boxes, flip))
            recipes = [self.recipe_1, self.recipe_2]
            images = cut_views(batch.image, squashed, flip, self.global_size, recipes, color_draws, self.mean, self.std)
        seed, epoch = (torch.full_like(batch.index, number) for number in draws)
        return TwoViews(images, boxes, flip, torch.stack([seed, epoch, batch.index], dim=1))
