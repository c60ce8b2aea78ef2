"""One view of every image, and which of its patches are hidden."""

from jaxtyping import Float, Int
from torch import Tensor

from ssl_distill.augment.base import ViewAugment
from ssl_distill.augment.color import DRAWS_PER_COLOR, Recipe, normalize
from ssl_distill.augment.crops import RandomCrop, as_floats, check_channels, check_recipes, color_crops
from ssl_distill.augment.geometry import DRAWS_PER_CROP
from ssl_distill.augment.masked_crop import patch_grid
from ssl_distill.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD
from ssl_distill.data.batch import ImageBatch
from ssl_distill.draws import Draws
from ssl_distill.views import MaskedImages

_CROP_STREAM, _MASK_STREAM, _COLOR_STREAM = range(3)


class MaskedImageAugment(ViewAugment[MaskedImages]):
    """A random resized crop, mirrored or not, and a random division of its patches. The defaults are dBOT's.

    Args:
        global_size: Height and width of the view in pixels.
        patch_size: Height and width of the backbone's patches in pixels.
        mask_ratio: Share of patches to hide.
        scale: Smallest and largest area of the crop as a share of the image.
        ratio: Smallest and largest width over height of the crop in the original image.
        flip_probability: Share of views that are mirrored left to right.
        recipe: Colours of the views, a `ColorRecipe` or a `KorniaRecipe`; None leaves them as they are.
        mean: Of the channels in [0, 1]; subtracted last.
        std: Of the channels; divided by last.

    Source: dBOT (arXiv 2209.03917), as in MAE (arXiv 2111.06377).
    """

    def __init__(
        self,
        global_size: int = 224,
        patch_size: int = 16,
        mask_ratio: float = 0.75,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_probability: float = 0.5,
        recipe: Recipe | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        check_channels(mean, std)
        check_recipes([recipe] if recipe else [], mean)
        self.crop = RandomCrop(global_size, scale, ratio, flip_probability, names=("global_size", "scale"))
        self.grid = patch_grid(global_size, patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        if not 0 < mask_ratio < 1:
            raise ValueError(
                f"`mask_ratio` must be above 0, or nothing is to be predicted, and below 1, or nothing is seen; got"
                f" {mask_ratio}."
            )
        if not 0 < num_kept(self.num_patches, mask_ratio) < self.num_patches:
            raise ValueError(
                f"`mask_ratio` must keep and hide at least one of {self.num_patches} patches, got {mask_ratio}."
            )
        self.global_size = global_size
        self.patch_size = patch_size
        self.mask_ratio = mask_ratio
        self.recipe = recipe
        self.mean = mean
        self.std = std

    def cut(self, batch: ImageBatch, draws: Draws) -> MaskedImages:
        """Views in the images' own colours, and divisions."""
        places = self.crop.place(batch.source_size, draws.uniform(batch.index, _CROP_STREAM, DRAWS_PER_CROP)[None])
        (crops,) = self.crop.cut(batch.image, batch.source_size, places)
        noise = draws.uniform(batch.index, _MASK_STREAM, self.num_patches)
        return MaskedImages(crops, *divide_patches(noise, self.mask_ratio))

    def finish(self, views: MaskedImages, index: Int[Tensor, "B"], draws: Draws) -> MaskedImages:
        """Colours by the recipe."""
        if self.recipe is None:
            return views._replace(images=normalize(as_floats(views.images), self.mean, self.std))
        uniform = draws.uniform(index, _COLOR_STREAM, DRAWS_PER_COLOR)
        (images,) = color_crops(views.images[None], [self.recipe], uniform[None], self.mean, self.std)
        return views._replace(images=images)


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """How many of the patches are seen: the whole part of their share."""
    return int(num_patches * (1 - mask_ratio))


def divide_patches(noise: Float[Tensor, "B N"], mask_ratio: float) -> tuple[Int[Tensor, "B Nk"], Int[Tensor, "B Nh"]]:
    """Patches to keep, those with the smallest numbers, and patches to hide, each in the order of their numbers.

    Args:
        noise: A random number for every patch.
        mask_ratio: Share of patches to hide; what is left of a patch is hidden too.

    Source: MAE (arXiv 2111.06377), section 3 and appendix.
    """
    order = noise.argsort(dim=1, stable=True)
    kept = num_kept(noise.shape[1], mask_ratio)
    return order[:, :kept], order[:, kept:]
