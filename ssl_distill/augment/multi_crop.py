"""Global and local crops, as DINO and its relatives eat them."""

from jaxtyping import Int
from torch import Tensor

from ssl_distill.augment.base import ViewAugment
from ssl_distill.augment.color import ColorRecipe, Recipe
from ssl_distill.augment.crops import (
    RandomCrop,
    check_channels,
    check_count,
    check_recipes,
    color_crops,
    color_draws,
    crop_draws,
)
from ssl_distill.data.batch import ImageBatch, ObjectBatch
from ssl_distill.draws import Draws
from ssl_distill.views import MultiCrop

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GLOBAL_1 = ColorRecipe(blur_probability=1.0)
GLOBAL_2 = ColorRecipe(blur_probability=0.1, solarize_probability=0.2)
LOCAL = ColorRecipe(blur_probability=0.5)


class MultiCropAugment(ViewAugment[MultiCrop]):
    """Two global and some local crops of every image. The defaults are DINO's.

    Args:
        global_size: Height and width of global crops in pixels.
        local_size: Height and width of local crops in pixels.
        num_local: Local crops per image; may be 0.
        global_scale: Smallest and largest area of a global crop as a share of the image.
        local_scale: The same of a local crop.
        ratio: Smallest and largest width over height of a crop in the original image.
        flip_probability: Share of crops that are mirrored left to right.
        global_recipe_1: Colours of the first global crop: a `ColorRecipe` or a `KorniaRecipe`.
        global_recipe_2: Colours of the second global crop.
        local_recipe: Colours of local crops.
        mean: Of the channels in [0, 1]; subtracted last.
        std: Of the channels; divided by last.

    Source: DINO (arXiv 2104.14294), section 3.1 and its official code.
    """

    def __init__(
        self,
        global_size: int = 224,
        local_size: int = 96,
        num_local: int = 8,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_probability: float = 0.5,
        global_recipe_1: ColorRecipe = GLOBAL_1,  # not Recipe: jsonargparse would forget a union's default
        global_recipe_2: ColorRecipe = GLOBAL_2,
        local_recipe: ColorRecipe = LOCAL,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        check_count({"num_local": num_local})
        check_channels(mean, std)
        check_recipes([global_recipe_1, global_recipe_2, local_recipe], mean)
        self.global_crop = RandomCrop(
            global_size, global_scale, ratio, flip_probability, names=("global_size", "global_scale")
        )
        self.local_crop = RandomCrop(
            local_size, local_scale, ratio, flip_probability, names=("local_size", "local_scale")
        )
        self.global_size = global_size
        self.local_size = local_size
        self.num_local = num_local
        self.global_recipes: list[Recipe] = [global_recipe_1, global_recipe_2]
        self.local_recipes: list[Recipe] = [local_recipe] * num_local
        self.mean = mean
        self.std = std

    def cut(self, batch: ImageBatch | ObjectBatch, draws: Draws) -> MultiCrop:
        """Crops in the images' own colours; objects are left out."""
        kinds = ((self.global_crop, len(self.global_recipes)), (self.local_crop, self.num_local))
        places = [
            crop.place(batch.source_size, crop_draws(draws, batch.index, stream, views))
            for stream, (crop, views) in enumerate(kinds)
        ]
        return MultiCrop(
            *(crop.cut(batch.image, batch.source_size, at) for (crop, _), at in zip(kinds, places, strict=True))
        )

    def finish(self, views: MultiCrop, index: Int[Tensor, "B"], draws: Draws) -> MultiCrop:
        """Colours of each crop by its recipe."""
        recipes = (self.global_recipes, self.local_recipes)
        return MultiCrop(
            *(
                color_crops(crops, each, color_draws(draws, index, stream, len(each)), self.mean, self.std)
                for stream, (crops, each) in enumerate(zip(views, recipes, strict=True))
            )
        )


def v2_as_run(global_size: int = 224, local_size: int = 96, num_local: int = 8) -> MultiCropAugment:
    """The multi-crop that DINOv2 and v3 were trained with: they pass 1 - p where the blur's probability is meant.

    Args:
        global_size: Height and width of global crops in pixels.
        local_size: Height and width of local crops in pixels.
        num_local: Local crops per image.

    Source: DINOv2 (arXiv 2304.07193), official code.
    """
    # Deviation: they cut the blur's kernel at 9 pixels, which narrows the widest blurs a little; ours is whole.
    return MultiCropAugment(
        global_size,
        local_size,
        num_local,
        global_scale=(0.32, 1.0),
        local_scale=(0.05, 0.32),
        global_recipe_1=ColorRecipe(blur_probability=0.0),
        global_recipe_2=ColorRecipe(blur_probability=0.9, solarize_probability=0.2),
    )
