"""A teacher's token grid, read at pixels: as if it were upsampled to the picture first, without doing so."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Placement = Callable[[Tensor, int, int], Any]
"""Pixel numbers, pixels and tokens per side to fractional token numbers (a tensor; the CLI wants it said loosely)."""


def corner_aligned(pixel: Int[Tensor, "M"], num_pixels: int, num_tokens: int) -> Float[Tensor, "M"]:
    """The first pixel lies on the first token's centre, the last on the last: what the published code does.

    Features are moved by up to half a patch at the borders.
    """
    return pixel.double() * ((num_tokens - 1) / max(num_pixels - 1, 1))


def half_pixel(pixel: Int[Tensor, "M"], num_pixels: int, num_tokens: int) -> Float[Tensor, "M"]:
    """Where the pixel's centre is among the patches' centres."""
    return ((pixel.double() + 0.5) * num_tokens / num_pixels - 0.5).clamp(0, num_tokens - 1)


def read_out(
    tokens: Float[Tensor, "B D h w"],
    pixels: Int[Tensor, "M 3"],
    image_size: tuple[int, int],
    placement: Placement = corner_aligned,
) -> Float[Tensor, "M D"]:
    """Bilinear samples of the token grid.

    Equal to `interpolate(tokens, image_size, mode="bilinear", align_corners=True)` at the pixels with `corner_aligned`,
    and to `align_corners=False` with `half_pixel`. Memory grows with the pairs, not with the picture.

    Args:
        tokens: One grid per picture.
        pixels: Picture, row and column.
        image_size: Height and width of the pictures in pixels.
        placement: Where pixels lie among tokens.
    """
    picture, *places = pixels.T
    rows = tokens.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, D)
    sides = tokens.shape[2:]
    lower, upper, weight = [], [], []
    for pixel, num_pixels, num_tokens in zip(places, image_size, sides, strict=True):
        place = placement(pixel, num_pixels, num_tokens)
        first = place.floor().long().clamp(0, num_tokens - 1)
        lower.append(first)
        upper.append((first + 1).clamp(max=num_tokens - 1))
        weight.append((place - first).to(tokens.dtype)[:, None])

    def at(row: Tensor, column: Tensor) -> Tensor:
        return rows[(picture * sides[0] + row) * sides[1] + column]

    top = torch.lerp(at(lower[0], lower[1]), at(lower[0], upper[1]), weight[1])
    bottom = torch.lerp(at(upper[0], lower[1]), at(upper[0], upper[1]), weight[1])
    return torch.lerp(top, bottom, weight[0])
