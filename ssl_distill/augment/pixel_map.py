"""Where the pixels of a picture went, and how masks and points follow them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

_DISTANCES_AT_ONCE = 2**24


class Followed(NamedTuple):
    """Points in another picture.

    Attributes:
        points: x and y in pixels; the first pixel reaches from 0 to 1.
        shown: False where the other picture does not show the point; its place then means nothing.
    """

    points: Float[Tensor, "B P 2"]
    shown: Bool[Tensor, "B P"]


class PixelMap(NamedTuple):
    """Which point of a crop each pixel of a view shows.

    Attributes:
        place: x and y in pixels of the crop, of what the middle of each pixel of the view shows.
        shown: False where a pixel of the view shows nothing of the crop.
    """

    place: Float[Tensor, "B 2 H W"]
    shown: Bool[Tensor, "B H W"]

    def masks(self, masks: Float[Tensor, "B M H W"]) -> Float[Tensor, "B M H W"]:
        """Masks of the crop as masks of the view; 0 where the view shows nothing of the crop."""
        moved = F.grid_sample(masks, self._grid(self.place.permute(0, 2, 3, 1)), mode="nearest", align_corners=False)
        return moved * self.shown[:, None]

    def to_crop(self, points: Float[Tensor, "B P 2"]) -> Followed:
        """Where points of the view lie in the crop."""
        grid = self._grid(points)[:, :, None]
        place = F.grid_sample(self.place, grid, "bilinear", "border", align_corners=False)
        shown = F.grid_sample(self.shown[:, None].to(place), grid, "nearest", "border", align_corners=False)
        within = (grid.abs() <= 1).all(-1)[..., 0]
        return Followed(place[..., 0].transpose(1, 2), (shown[:, 0, :, 0] > 0.5) & within)

    def to_view(self, points: Float[Tensor, "B P 2"]) -> Followed:
        """Where points of the crop lie in the view: at the pixel that shows the nearest, and a step from its middle."""
        images, count = points.shape[:2]
        at_once = max(1, _DISTANCES_AT_ONCE // max(1, count * self.shown[0].numel()))
        parts = [slice(start, start + at_once) for start in range(0, images, at_once)]
        followed = [PixelMap(*(each[part] for each in self))._to_view(points[part]) for part in parts]
        return Followed(*(torch.cat(column) for column in zip(*followed, strict=True)))

    def _to_view(self, points: Tensor) -> Followed:
        height, width = self.shown.shape[1:]
        place, shown = self.place.flatten(2).transpose(1, 2), self.shown.flatten(1)  # (B, HW, 2), (B, HW)
        distance = torch.cdist(points, place, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distance.masked_fill_(~shown[:, None], torch.inf).argmin(-1)  # (B, P)
        row, column = nearest // width, nearest % width

        def at(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
            """What a pixel shows, and whether it is there and shows anything."""
            within = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            number = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            return place.gather(1, number[..., None].expand(-1, -1, 2)), shown.gather(1, number) & within

        def change(rows: int, columns: int) -> Tensor:
            """Of the place from pixel to pixel in one direction; at the last pixel that shows anything, half of it."""
            ends = [at(row + sign * rows, column + sign * columns) for sign in (1, -1)]
            (after, there), (before, back) = ((torch.where(ok[..., None], end, middle), ok) for end, ok in ends)
            return (after - before) / (there.to(middle) + back.to(middle)).clamp(min=1)[..., None]

        middle, found = at(row, column)
        along_x, along_y = change(0, 1), change(1, 0)
        missing = points - middle
        area = _cross(along_x, along_y)
        safe = torch.where(area.abs() > 1e-6, area, 1.0)
        step = torch.stack([_cross(missing, along_y), _cross(along_x, missing)], dim=-1) / safe[..., None]
        points = torch.stack([column, row], dim=-1) + 0.5 + step
        size = points.new_tensor([width, height])
        near = (step.abs() <= 1).all(-1) & (area.abs() > 1e-6)
        return Followed(points, found & near & ((points >= 0) & (points <= size)).all(-1))

    def views(self, count: int) -> "list[PixelMap]":
        """The maps of so many views, which follow one another."""
        return [PixelMap(*parts) for parts in zip(*(each.chunk(count) for each in self), strict=True)]

    def _grid(self, points: Tensor) -> Tensor:
        """Points (..., 2) in pixels as `grid_sample` wants them."""
        height, width = self.shown.shape[1:]
        return torch.stack([points[..., 0] * (2 / width) - 1, points[..., 1] * (2 / height) - 1], dim=-1)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def joined(maps: Sequence[PixelMap]) -> PixelMap:
    """The maps of several views as one."""
    return PixelMap(*(torch.cat(column) for column in zip(*maps, strict=True)))


def unmoved(shape: tuple[int, int, int, int], device: torch.device) -> PixelMap:
    """The map of images (B, C, H, W) whose pixels all stay at their places."""
    batch, _, height, width = shape
    x, y = (torch.arange(size, device=device) + 0.5 for size in (width, height))
    place = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)])
    return PixelMap(place.expand(batch, -1, -1, -1), torch.ones(batch, height, width, dtype=torch.bool, device=device))
