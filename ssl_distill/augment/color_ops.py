"""Colour operators that kornia has not, as kornia modules: they stand in anybody's `AugmentationSequential`.

They are kept beside kornia's where those are measurably slow or draw for a whole batch; docs/augmentation.md has the
numbers, tools/bench/operators.py takes them.
"""

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from kornia.augmentation import IntensityAugmentationBase2D, random_generator
from kornia.color import rgb_to_grayscale
from torch import Tensor

from ssl_distill.augment.checks import check_range
from ssl_distill.augment.resample import mix_lines

Range = float | tuple[float, float]

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_ORDERS = torch.tensor(list(itertools.permutations(range(4))))  # the jitter's sub-steps in all 24 orders
NUM_ORDERS = len(_ORDERS)


class PerImageColorJitter(IntensityAugmentationBase2D):
    """`kornia.augmentation.ColorJitter` with an order of its sub-steps for every image instead of one per batch.

    Images of 3 channels, or of any number where `saturation` and `hue` are 0: then grey is the mean of the channels.

    Args:
        brightness: Factor drawn from 1 -+ this, or from this range.
        contrast: The same.
        saturation: The same.
        hue: Turn drawn from -+ this or from this range, as a share of the colour circle; at most 0.5.
        same_on_batch: As everywhere in kornia.
        p: Share of images that are jittered.
        keepdim: As everywhere in kornia.
    """

    def __init__(
        self,
        brightness: Range = 0.0,
        contrast: Range = 0.0,
        saturation: Range = 0.0,
        hue: Range = 0.0,
        same_on_batch: bool = False,
        p: float = 1.0,
        keepdim: bool = False,
    ) -> None:
        super().__init__(p=p, same_on_batch=same_on_batch, keepdim=keepdim)
        positive = (0.0, math.inf)
        self._param_generator = random_generator.PlainUniformGenerator(
            (brightness, "brightness_factor", 1.0, positive),
            (contrast, "contrast_factor", 1.0, positive),
            (saturation, "saturation_factor", 1.0, positive),
            (hue, "hue_factor", 0.0, (-0.5, 0.5)),
            ((0.0, float(NUM_ORDERS)), "order", None, None),
        )
        self.needs_rgb = saturation not in (0, (1, 1)) or hue not in (0, (0, 0))

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Jittered images in [0, 1]."""
        if self.needs_rgb:
            check_rgb(input.shape[1], "PerImageColorJitter", "set `saturation` and `hue` to 0")
        factors = [params[f"{name}_factor"] for name in ("brightness", "contrast", "saturation")]
        images = input.clamp(0, 1)
        order = params["order"].long().clamp(max=NUM_ORDERS - 1).to(input.device)
        jitter(images, torch.stack(factors, dim=1).to(input), params["hue_factor"].to(input), order)
        return images


class HueTurn(IntensityAugmentationBase2D):
    """`kornia.augmentation.RandomHue` in an eighth of its time; images of 3 channels in [0, 1].

    Args:
        hue: Turn drawn from -+ this or from this range, as a share of the colour circle; at most 0.5.
        same_on_batch: As everywhere in kornia.
        p: Share of images that are turned.
        keepdim: As everywhere in kornia.
    """

    def __init__(self, hue: Range = 0.0, same_on_batch: bool = False, p: float = 1.0, keepdim: bool = False) -> None:
        super().__init__(p=p, same_on_batch=same_on_batch, keepdim=keepdim)
        self._param_generator = random_generator.PlainUniformGenerator((hue, "hue_factor", 0.0, (-0.5, 0.5)))

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Turned images."""
        check_rgb(input.shape[1], "HueTurn", "leave it out")
        return shift_hue(input.clamp(0, 1), params["hue_factor"].to(input))


class WholeGaussianBlur(IntensityAugmentationBase2D):
    """`kornia.augmentation.RandomGaussianBlur` with a kernel that is never too short and repeated borders.

    Images of any number of channels.

    Args:
        sigma: Smallest and largest standard deviation in pixels.
        same_on_batch: As everywhere in kornia.
        p: Share of images that are blurred.
        keepdim: As everywhere in kornia.
    """

    def __init__(
        self,
        sigma: tuple[float, float] = (0.1, 2.0),
        same_on_batch: bool = False,
        p: float = 0.5,
        keepdim: bool = False,
    ) -> None:
        super().__init__(p=p, same_on_batch=same_on_batch, keepdim=keepdim)
        check_range("sigma", sigma)
        self.largest_sigma = sigma[1]
        self._param_generator = random_generator.PlainUniformGenerator((sigma, "sigma", None, None))

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Blurred images."""
        return blur(input, params["sigma"].to(input), self.largest_sigma)


def check_rgb(channels: int, operator: str, mend: str) -> None:
    """Refuse images without red, green and blue.

    Raises:
        ValueError: If there are not 3 channels.
    """
    if channels != 3:
        raise ValueError(f"`{operator}` changes colours of 3 channels (RGB), got images of {channels}; {mend}.")


def change_where(chosen: Tensor, images: Tensor, change: Callable[..., Tensor], *amounts: Tensor) -> None:
    """Change some of the images in place.

    Args:
        chosen: Images to change (N,).
        images: Images (N, C, H, W).
        change: Images and their amounts to changed images.
        amounts: A number or a row per image (N, ...).
    """
    if images.device.type == "cpu":
        rows = chosen.nonzero()[:, 0]
        if len(rows):
            changed = change(images.index_select(0, rows), *(amount[rows] for amount in amounts))
            images.index_copy_(0, rows, changed.expand(-1, images.shape[1], -1, -1))
    else:  # to ask a GPU how many are chosen is to wait for it
        torch.where(chosen[:, None, None, None], change(images, *amounts), images, out=images)


def jitter(
    images: Float[Tensor, "N C H W"], factors: Float[Tensor, "N 3"], turn: Float[Tensor, "N"], order: Int[Tensor, "N"]
) -> None:
    """Change brightness, contrast, saturation and hue in place, each image in its own order.

    Args:
        images: In [0, 1]. Saturation and hue of other than 3 channels must not change.
        factors: Of brightness, contrast and saturation; 1 changes nothing.
        turn: Of hue, as a share of the colour circle.
        order: Number of the permutation of the four sub-steps, in lexicographic order.
    """
    # Deviation: kornia's ColorJitter has the same formulas, but draws the order once per batch instead of per image.
    # Whatever the order, three blends with grey or black follow one another, with hue before, between or after.
    blends, hue_place = (table[order] for table in _order_tables(order.device))  # (N, 3), (N,)
    for place in range(4):
        if images.shape[1] == 3:
            change_where((hue_place == place) & (turn != 0), images, shift_hue, turn)
        if place < 3:
            _blend(images, blends[:, place], factors.gather(1, blends[:, place, None])[:, 0])


@cache
def _order_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For every order, the three sub-steps without hue, and how many of them are before hue."""
    hue = _ORDERS == _HUE
    return _ORDERS[~hue].view(-1, 3).to(device), hue.nonzero()[:, 1].to(device)


def _blend(images: Float[Tensor, "N C H W"], step: Int[Tensor, "N"], factor: Float[Tensor, "N"]) -> None:
    """factor * image + (1 - factor) * base, clamped; the base is black, the image's mean grey, or its grey pixels."""
    gray = rgb_to_grayscale(images) if images.shape[1] == 3 else images.mean(dim=1, keepdim=True)
    rest = 1 - factor
    of_pixel = rest * (step == _SATURATION)
    of_mean = rest * (step == _CONTRAST) * gray.mean(dim=(1, 2, 3))
    base = torch.addcmul(of_mean[:, None, None, None], gray, of_pixel[:, None, None, None])
    torch.addcmul(base, images, factor[:, None, None, None], out=images).clamp_(0, 1)


def shift_hue(images: Float[Tensor, "N 3 H W"], turn: Float[Tensor, "N"]) -> Float[Tensor, "N 3 H W"]:
    """Turn every colour around the HSV hexagon, exactly, without making an HSV image.

    Args:
        images: In [0, 1].
        turn: Share of the full circle.
    """
    red, green, blue = images.unbind(1)
    low = red.minimum(green).minimum(blue)
    chroma = red.maximum(green).maximum(blue).sub_(low)
    # Deviation: kornia.enhance.adjust_hue gives the same colours in eight times the time.
    # On the hexagon red is at 0, green at 2, blue at 4; the way from red is 1 + (green + blue - red - low) / chroma.
    sector = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-12)).add_(1).copysign_(green - blue)
    sector.add_(6 * turn[:, None, None])
    sector.sub_((sector / 6).floor_(), alpha=6)

    shifted = torch.empty_like(images)
    shares = ((sector - 3).abs_().sub_(1), 2 - (sector - 2).abs_(), 2 - (sector - 4).abs_())
    for channel, share in enumerate(shares):
        torch.addcmul(low, chroma, share.clamp_(0, 1), out=shifted[:, channel])
    return shifted


def blur(images: Float[Tensor, "N C H W"], sigma: Float[Tensor, "N"], largest_sigma: float) -> Float[Tensor, "N C H W"]:
    """Gaussian blur, each image with its own width.

    Args:
        images: Images whose border pixels are repeated outwards.
        sigma: Standard deviation in pixels.
        largest_sigma: Sets the size of the kernel: three deviations to each side.
    """
    # Deviation: kornia.filters.gaussian_blur2d gives the same images in 1.3 times the time.
    radius = math.ceil(3 * largest_sigma)
    offset = torch.arange(-radius, radius + 1, device=images.device)
    weight = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    weight = (weight / weight.sum(dim=1, keepdim=True))[:, None]  # (N, 1, K): the same for all lines
    itself = torch.arange(len(images), device=images.device)
    for _ in range(2):  # down the columns, then, transposed, along the rows
        lines = images.shape[2]
        position = (torch.arange(lines, device=images.device)[:, None] + offset).clamp(0, lines - 1)
        shape = (len(images), *position.shape)
        images = mix_lines(images, itself, position.expand(shape), weight.expand(shape)).transpose(2, 3).contiguous()
    return images
