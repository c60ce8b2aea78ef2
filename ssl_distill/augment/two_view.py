"""Two views of every image, with their geometry."""

import torch
from jaxtyping import Int
from torch import Tensor

from ssl_distill.augment.base import ViewAugment
from ssl_distill.augment.color import Recipe
from ssl_distill.augment.crops import (
    RandomCrop,
    check_channels,
    check_recipes,
    color_crops,
    color_draws,
    crop_draws,
    pixel_map,
)
from ssl_distill.augment.multi_crop import GLOBAL_1, GLOBAL_2, IMAGENET_MEAN, IMAGENET_STD
from ssl_distill.augment.resample import Filter
from ssl_distill.data.batch import ImageBatch
from ssl_distill.draws import Draws
from ssl_distill.views import TwoViews


class TwoViewAugment(ViewAugment[TwoViews]):
    """Two crops of every image, each with colours of its own recipe. The defaults are BYOL's.

    Args:
        global_size: Height and width of the views in pixels.
        scale: Smallest and largest area of a view as a share of the image.
        ratio: Smallest and largest width over height of a view in the original image.
        flip_probability: Share of views that are mirrored left to right.
        recipe_1: Colours of first views: a `ColorRecipe` or a `KorniaRecipe`.
        recipe_2: Colours of second views.
        filter: Of the antialiased resampling.
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
        recipe_1: Recipe = GLOBAL_1,
        recipe_2: Recipe = GLOBAL_2,
        filter: Filter = "bilinear",
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        check_channels(mean, std)
        check_recipes([recipe_1, recipe_2], mean, "pairs of pixels")
        self.crop = RandomCrop(global_size, scale, ratio, flip_probability, filter, names=("global_size", "scale"))
        self.global_size = global_size
        self.recipes = [recipe_1, recipe_2]
        self.mean = mean
        self.std = std

    def cut(self, batch: ImageBatch, draws: Draws) -> TwoViews:
        """Views in the images' own colours."""
        places = self.crop.place(batch.source_size, crop_draws(draws, batch.index, 0, 2))
        images = self.crop.cut(batch.image, batch.source_size, places)
        seed, epoch = (torch.full_like(batch.index, number) for number in draws)
        moved = pixel_map(self.recipes, images.shape[-3:], color_draws(draws, batch.index, 0, 2))
        return TwoViews(images, *places, torch.stack([seed, epoch, batch.index], dim=1), moved)

    def finish(self, views: TwoViews, index: Int[Tensor, "B"], draws: Draws) -> TwoViews:
        """Colours of each view by its recipe."""
        drawn = color_draws(draws, index, 0, 2)
        return views._replace(images=color_crops(views.images, self.recipes, drawn, self.mean, self.std))
