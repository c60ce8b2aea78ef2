"""Colours of crops: a recipe says what may happen, uniform numbers decide what happens to each crop."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import kornia.augmentation as K
import torch
from jaxtyping import Bool, Float, Int
from kornia import enhance
from kornia.color import rgb_to_grayscale
from torch import Tensor

from ssl_distill.augment.checks import check_probability, check_range
from ssl_distill.augment.color_ops import (
    NUM_ORDERS,
    PerImageColorJitter,
    WholeGaussianBlur,
    blur,
    change_where,
    check_rgb,
    jitter,
)
from ssl_distill.augment.kornia_recipe import KorniaRecipe

DRAWS_PER_COLOR = 10
"""Uniform numbers that the colours of one crop consume."""

SOLARIZE_FROM = 128 / 255
"""Brightness from which `ColorRecipe` inverts."""


@dataclass(frozen=True)
class ColorRecipe:
    """What may happen to the colours of a view, in this order: jitter, greyscale, blur, solarise.

    Args:
        jitter_probability: Share of crops whose colours are jittered.
        brightness: Factor drawn from 1 -+ this.
        contrast: Factor drawn from 1 -+ this.
        saturation: Factor drawn from 1 -+ this.
        hue: Turn drawn from -+ this, as a share of the colour circle; at most 0.5.
        greyscale_probability: Share of crops that lose their colour.
        blur_probability: Share of crops that are blurred.
        blur_sigma: Smallest and largest standard deviation of the blur in pixels of the crop.
        solarize_probability: Share of crops whose bright half is inverted.
        both_probability: Share of crops that are blurred and inverted; None draws the two independently.

    Source: DINO (arXiv 2104.14294); the jitter's numbers are BYOL's.
    """

    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    greyscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0
    both_probability: float | None = None

    def __post_init__(self) -> None:
        for name in ("jitter", "greyscale", "blur", "solarize"):
            check_probability(f"{name}_probability", getattr(self, f"{name}_probability"))
        for name, most in {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5}.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"`{name}` must be from 0 (off) to {most}, got {getattr(self, name)}.")
        check_range("blur_sigma", self.blur_sigma)
        least = max(0.0, self.blur_probability + self.solarize_probability - 1)
        most = min(self.blur_probability, self.solarize_probability)
        if self.both_probability is not None and not least <= self.both_probability <= most:
            raise ValueError(
                f"`both_probability` must be from {least:g} to {most:g} with these of blur and solarisation, got"
                f" {self.both_probability}."
            )

    def pipeline(self) -> K.AugmentationSequential:
        """The recipe as kornia modules, which draw from the global generator: to be mended, or put into other code.

        Raises:
            ValueError: If blur and solarisation are not independent: kornia's modules are.
        """
        if self.both_probability is not None:
            raise ValueError(
                f"`both_probability` must be None to be made of kornia modules, got {self.both_probability}."
            )
        return K.AugmentationSequential(
            PerImageColorJitter(self.brightness, self.contrast, self.saturation, self.hue, p=self.jitter_probability),
            K.RandomGrayscale(p=self.greyscale_probability),
            WholeGaussianBlur(self.blur_sigma, p=self.blur_probability),
            K.RandomSolarize((SOLARIZE_FROM, SOLARIZE_FROM), (0.0, 0.0), p=self.solarize_probability),
            data_keys=["input"],
        )

    def check_channels(self, count: int) -> None:
        """Refuse images whose colours the recipe cannot change.

        Raises:
            ValueError: If there are not 3 channels, and saturation, hue or greyscale would act on them.
        """
        if self.jitter_probability and (self.saturation or self.hue):
            check_rgb(count, "ColorRecipe.jitter", "set `saturation` and `hue` to 0")
        if self.greyscale_probability:
            check_rgb(count, "ColorRecipe.greyscale", "set `greyscale_probability` to 0")

    def decide(self, uniform: Float[Tensor, "N draws"]) -> "ColorDecisions":
        """What happens to N crops; `uniform` holds `DRAWS_PER_COLOR` numbers in [0, 1) for each."""
        jitter, order, *numbers, greyscale, blur, sigma, solarize = uniform.unbind(1)
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        jittered = jitter < self.jitter_probability
        *factors, turn = (
            (2 * number - 1) * strength * jittered for number, strength in zip(numbers, strengths, strict=True)
        )
        low, high = self.blur_sigma
        blurred = blur < self.blur_probability
        inverted = solarize < self.solarize_probability
        if self.both_probability is not None:
            of_blurred = self.both_probability / max(self.blur_probability, 1e-12)
            of_sharp = (self.solarize_probability - self.both_probability) / max(1 - self.blur_probability, 1e-12)
            inverted = torch.where(blurred, solarize < of_blurred, solarize < of_sharp)
        return ColorDecisions(
            factors=1 + torch.stack(factors, dim=1),
            turn=turn,
            order=(order * NUM_ORDERS).long(),
            greyscale=greyscale < self.greyscale_probability,
            blur=blurred,
            sigma=low + (high - low) * sigma,
            solarize=inverted,
        )


class ColorDecisions(NamedTuple):
    """What happens to the colours of N crops.

    Attributes:
        factors: Brightness, contrast and saturation; 1 changes nothing.
        turn: Of hue, as a share of the colour circle.
        order: Which of the 24 orders the jitter's sub-steps take.
        greyscale: Crops that lose their colour.
        blur: Crops that are blurred.
        sigma: Standard deviation in pixels that they are blurred with.
        solarize: Crops whose bright half is inverted.
    """

    factors: Float[Tensor, "N 3"]
    turn: Float[Tensor, "N"]
    order: Int[Tensor, "N"]
    greyscale: Bool[Tensor, "N"]
    blur: Bool[Tensor, "N"]
    sigma: Float[Tensor, "N"]
    solarize: Bool[Tensor, "N"]


Recipe = ColorRecipe | KorniaRecipe
"""What happens to the crops of one view after they are cut."""


def recolor(
    crops: Float[Tensor, "V B C H W"], recipes: Sequence[Recipe], uniform: Float[Tensor, "V B draws"]
) -> Float[Tensor, "V B C H W"]:
    """Change the colours of crops, one recipe per view.

    Args:
        crops: Crops in [0, 1]; overwritten.
        recipes: One per view.
        uniform: `DRAWS_PER_COLOR` numbers in [0, 1) per crop; they alone decide what happens to it.

    Returns:
        Crops in [0, 1].
    """
    groups: dict[object, list[int]] = {}  # views that are changed together
    for view, recipe in enumerate(recipes):
        groups.setdefault(ColorRecipe if isinstance(recipe, ColorRecipe) else recipe, []).append(view)
    if list(groups) == [ColorRecipe]:
        return _recolor(crops, recipes, uniform)
    for views in groups.values():
        images, numbers = (torch.stack([each[view] for view in views]) for each in (crops, uniform))
        recipe = recipes[views[0]]
        if isinstance(recipe, ColorRecipe):
            changed = _recolor(images, [recipes[view] for view in views], numbers)
        else:
            changed = recipe(images.flatten(0, 1), numbers.flatten(0, 1)).view_as(images)
        for view, crop in zip(views, changed, strict=True):
            crops[view] = crop
    return crops


def _recolor(crops: Tensor, recipes: Sequence[Any], uniform: Tensor) -> Tensor:
    """What the recipes' `pipeline` gives for the same decisions, in a fraction of its time.

    kornia's containers apply every operator to all crops and choose afterwards.
    """
    for recipe in recipes:
        recipe.check_channels(crops.shape[2])
    per_view = [recipe.decide(numbers) for recipe, numbers in zip(recipes, uniform, strict=True)]
    decided = ColorDecisions(*(torch.cat(column) for column in zip(*per_view, strict=True)))
    images = crops.flatten(0, 1)
    jitter(images, decided.factors, decided.turn, decided.order)
    if images.shape[1] == 3:
        change_where(decided.greyscale, images, rgb_to_grayscale)
    widest = partial(blur, largest_sigma=max(recipe.blur_sigma[1] for recipe in recipes))
    change_where(decided.blur, images, widest, decided.sigma)
    change_where(decided.solarize, images, partial(enhance.solarize, thresholds=SOLARIZE_FROM))
    return images.view_as(crops)


def normalize(
    images: Float[Tensor, "*V C H W"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "*V C H W"]:
    """Subtract the mean and divide by the standard deviation of each channel.

    Raises:
        ValueError: If the numbers are not one per channel.
    """
    channels = images.shape[-3]
    if not len(mean) == len(std) == channels:
        raise ValueError(f"`mean` and `std` must have one number per channel, {channels} here, got {mean} and {std}.")
    numbers = (_channel_numbers(tuple(each), images.device, images.dtype) for each in (mean, std))
    return enhance.normalize(images.reshape(-1, *images.shape[-3:]), *numbers).view_as(images)


@cache
def _channel_numbers(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Kept on the device: to copy them there for every batch is to wait for it every time."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype)
