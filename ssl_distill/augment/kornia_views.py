"""Anybody's kornia pipelines as the colours of multi-crop."""

from torch import nn

from ssl_distill.augment.color import ColorRecipe
from ssl_distill.augment.crops import check_recipes
from ssl_distill.augment.kornia_recipe import KorniaRecipe
from ssl_distill.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD, MultiCropAugment

_NOTHING = ColorRecipe(jitter_probability=0.0, greyscale_probability=0.0, blur_probability=0.0)


class KorniaViews(MultiCropAugment):
    """Two global and some local crops of every image, each through a kornia pipeline instead of a `ColorRecipe`.

    Where crops lie is drawn as by `MultiCropAugment`; pipelines change colours, or move pixels inside of a crop.
    With masks, such as iBOT's and ODIS', it is their `crops`. UDI and PCD take a `KorniaRecipe` for each view.

    Args:
        global_1: Of first global crops: a module of `kornia.augmentation`, or a list of such, one after the other.
        global_2: Of second global crops; None is `global_1`.
        local: Of local crops; None is `global_1`.
        global_size: As in `MultiCropAugment`.
        local_size: As in `MultiCropAugment`.
        num_local: As in `MultiCropAugment`.
        global_scale: As in `MultiCropAugment`.
        local_scale: As in `MultiCropAugment`.
        ratio: As in `MultiCropAugment`.
        flip_probability: As in `MultiCropAugment`.
        mean: As in `MultiCropAugment`, one for each channel of the images.
        std: As in `MultiCropAugment`.
    """

    def __init__(
        self,
        global_1: nn.Module | list[nn.Module],
        global_2: nn.Module | list[nn.Module] | None = None,
        local: nn.Module | list[nn.Module] | None = None,
        global_size: int = 224,
        local_size: int = 96,
        num_local: int = 8,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_probability: float = 0.5,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__(
            global_size,
            local_size,
            num_local,
            global_scale,
            local_scale,
            ratio,
            flip_probability,
            _NOTHING,
            _NOTHING,
            _NOTHING,
            mean,
            std,
        )
        self.global_recipes = [KorniaRecipe(each) for each in (global_1, global_1 if global_2 is None else global_2)]
        self.local_recipes = [KorniaRecipe(global_1 if local is None else local)] * num_local
        check_recipes([*self.global_recipes, *self.local_recipes], mean)
