"""Where crops lie: boxes and flips without pixels."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_TRIES = 10
DRAWS_PER_CROP = 2 * _TRIES + 3
"""Uniform numbers that one crop consumes: area and aspect ratio of every try, top, left, flip."""


class CropBoxes(NamedTuple):
    """Where crops lie.

    Attributes:
        boxes_xyxy: Left, top, right, bottom edges in pixels of the image.
        flip: True where the crop is mirrored left to right after it was cut out.
    """

    boxes_xyxy: Float[Tensor, "*views 4"]
    flip: Bool[Tensor, "*views"]


def sample_crops(
    source_size: Float[Tensor, "N 2"],
    uniform: Float[Tensor, "N draws"],
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip_probability: float = 0.5,
) -> CropBoxes:
    """Random resized crops of images of any size, by torchvision's law.

    A try draws the area (uniform share of the image) and the aspect ratio (log-uniform) and counts if it fits. After
    ten misfits the crop is the largest centred one with the image's aspect ratio clamped to `ratio`.

    Args:
        source_size: Height and width in pixels of each crop's image.
        uniform: `DRAWS_PER_CROP` numbers in [0, 1) per crop; they alone decide it.
        scale: Smallest and largest area as a share of the image.
        ratio: Smallest and largest width over height.
        flip_probability: Share of crops that are mirrored.

    Returns:
        Boxes with whole-numbered edges inside the images.
    """
    area, log_ratio, top, left, flip = uniform.split([_TRIES, _TRIES, 1, 1, 1], dim=1)
    height, width = source_size.split(1, dim=1)  # (N, 1)

    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (log_low + (log_high - log_low) * log_ratio).exp()
    widths = (area * aspect).sqrt().round()
    heights = (area / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)  # (N, tries)

    first = fits.byte().argmax(dim=1, keepdim=True)
    accepted = fits.any(dim=1, keepdim=True)
    fallback_height = (width / ratio[0]).round().clamp(min=1).minimum(height)
    fallback_width = (height * ratio[1]).round().clamp(min=1).minimum(width)
    crop_height = torch.where(accepted, heights.gather(1, first), fallback_height)
    crop_width = torch.where(accepted, widths.gather(1, first), fallback_width)
    room_y, room_x = height - crop_height, width - crop_width
    # minimum: a draw just below 1 times a large room rounds up to room + 1.
    top = torch.where(accepted, (top * (room_y + 1)).floor().minimum(room_y), (room_y / 2).floor())
    left = torch.where(accepted, (left * (room_x + 1)).floor().minimum(room_x), (room_x / 2).floor())
    return CropBoxes(torch.cat([left, top, left + crop_width, top + crop_height], dim=1), flip[:, 0] < flip_probability)


def scale_boxes(
    boxes_xyxy: Float[Tensor, "*views B 4"], source_size: Float[Tensor, "B 2"], image_size: Sequence[int]
) -> Float[Tensor, "*views B 4"]:
    """Map boxes from the pixels of their images into images or masks that were stretched to (height, width)."""
    shrink = source_size.new_tensor(image_size) / source_size
    return boxes_xyxy * shrink.flip(1).repeat(1, 2)  # height, width to x, y, x, y
