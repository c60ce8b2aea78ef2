"""Which pixel of which teacher map a student's pixel is compared with."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ssl_distill.augment.pixel_map import Followed, joined
from ssl_distill.views import TwoViews


class PixelPairs(NamedTuple):
    """Positives of the student's pixels, in the student's order.

    Attributes:
        targets: Teacher vectors.
        valid: Whether the pixel has a counterpart; None where all have.
    """

    targets: Float[Tensor, "2 B C h w"]
    valid: Bool[Tensor, "2 B h w"] | None


def same_view(teacher_maps: Float[Tensor, "2 B C h w"], views: TwoViews) -> PixelPairs:
    """The same place of the same view."""
    return PixelPairs(teacher_maps, None)


def cross_view(teacher_maps: Float[Tensor, "2 B C h w"], views: TwoViews) -> PixelPairs:
    """The same grid position of the other view, which mostly shows another place of the image. The official code's."""
    return PixelPairs(teacher_maps.flip(0), None)


def cross_view_aligned(teacher_maps: Float[Tensor, "2 B C h w"], views: TwoViews) -> PixelPairs:
    """The same place of the image in the other view, interpolated; pixels that the other does not show are left out."""
    rows, columns = teacher_maps.shape[3:]
    boxes = views.boxes_xyxy.flatten(0, 1)[:, None, None]  # (2 B, 1, 1, 4)
    other_boxes = views.boxes_xyxy.flip(0).flatten(0, 1)[:, None, None]
    sign, other_sign = (_sign(flip)[:, None, None] for flip in (views.flip, views.flip.flip(0)))

    # Places run from -1 to 1 over a view, whose pixels' middles lie half a pixel inside.
    y = (torch.arange(rows, device=boxes.device) * 2 + 1) / rows - 1
    x = (torch.arange(columns, device=boxes.device) * 2 + 1) / columns - 1
    place = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).to(boxes.dtype).expand(len(boxes), -1, -1, -1)
    shown = torch.ones_like(place[..., 0], dtype=torch.bool)
    if views.moved is not None:
        place, shown = _followed(views.moved.to_crop, place, views.images)
    place = place * sign  # (2 B, h, w, 2)
    center, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
    other_center = (other_boxes[..., :2] + other_boxes[..., 2:]) / 2
    other_half = (other_boxes[..., 2:] - other_boxes[..., :2]) / 2
    there = (center + place * half - other_center) / other_half * other_sign
    if views.moved is not None:
        there, found = _followed(joined(views.moved.views(2)[::-1]).to_view, there, views.images)
        shown = shown & found

    others = teacher_maps.flip(0).flatten(0, 1)
    targets = F.grid_sample(others, there.to(others.dtype), padding_mode="border", align_corners=False)
    valid = (there.abs() <= 1).all(-1) & shown
    return PixelPairs(targets.view_as(teacher_maps), valid.unflatten(0, views.flip.shape))


def _followed(
    follow: Callable[[Tensor], Followed], place: Float[Tensor, "N h w 2"], images: Float[Tensor, "2 B C H W"]
) -> tuple[Float[Tensor, "N h w 2"], Bool[Tensor, "N h w"]]:
    """Places from -1 to 1 as places in another picture of the same size, and whether they are shown there."""
    size = place.new_tensor([images.shape[-1], images.shape[-2]])
    points, shown = follow(((place + 1) / 2 * size).flatten(1, 2))
    return (points / size * 2 - 1).view_as(place), shown.view(place.shape[:-1])


def _sign(flip: Bool[Tensor, "2 B"]) -> Float[Tensor, "N 2"]:
    """-1 for x in mirrored views."""
    x = 1 - 2 * flip.flatten().float()
    return torch.stack([x, torch.ones_like(x)], 1)
