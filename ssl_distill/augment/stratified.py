"""Stratified random samples of patches, and the same image points in the patch grid of another crop."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssl_distill.augment.pixel_map import Followed, PixelMap
from ssl_distill.views import TokenPositions


def num_samples(grid: int, window: int) -> int:
    """How many patches are sampled: one per window.

    Raises:
        ValueError: If no window fits the grid.
    """
    if not 1 <= window <= grid:
        raise ValueError(
            f"the sampling window must be from 1 to {grid}, the patches along a side of the grid, got {window}."
        )
    return (grid // window) ** 2


def stratified_patches(
    choice: Int[Tensor, "B S"], corner: Float[Tensor, "B"], grid: int, window: int
) -> Int[Tensor, "B S"]:
    """One patch of every window; windows tile a square in a corner of the grid.

    Args:
        choice: Number, row by row, of the patch chosen in each of S windows.
        corner: In [0, 1): the quarters are top left, top right, bottom left, bottom right. Without effect where windows
            tile the whole grid.
        grid: Patches along a side.
        window: Patches along a side of a window.

    Returns:
        Numbers of the patches in growing order.

    Source: UDI (arXiv 2407.17671), stratified random sampling.
    """
    per_side = grid // window
    number = torch.arange(per_side**2, device=choice.device)
    quarter = (corner * 4).long()
    margin = grid - per_side * window
    row = number // per_side * window + choice // window + (quarter // 2 * margin)[:, None]
    column = number % per_side * window + choice % window + (quarter % 2 * margin)[:, None]
    return (row * grid + column).sort(dim=1).values


def project_positions(
    patches: Int[Tensor, "N S"],
    source_box: Float[Tensor, "N 4"],
    target_box: Float[Tensor, "N 4"],
    source_grid: int,
    target_grid: int,
    leave: PixelMap | None = None,
    enter: PixelMap | None = None,
) -> tuple[TokenPositions, TokenPositions]:
    """Patches of one crop that lie in another, and where they are in the other's grid.

    The first and last patches of a grid are taken to lie on the border of their crop, as in the official code.

    Args:
        patches: Numbers of patches of the source.
        source_box: Top, left, bottom, right of the source in any common coordinates; left and right are swapped where
            the crop is mirrored.
        target_box: The same of the target.
        source_grid: Patches along a side of the source.
        target_grid: Patches along a side of the target.
        leave: Where pixels of the sources' crops went in their views; None where they stayed.
        enter: The same of the targets.

    Returns:
        The patches themselves with weight 1 where they lie inside the target, else 0 (N, S, 1); the four target patches
        around each with the weights of bilinear interpolation, or 0 (N, S, 4).

    Source: UDI (arXiv 2407.17671), position alignment.
    """
    place = torch.stack([patches // source_grid, patches % source_grid], dim=-1)  # (N, S, 2): row, column
    relative = place.to(source_box.dtype) / max(source_grid - 1, 1)
    shown = torch.ones_like(patches, dtype=torch.bool)
    if leave is not None:
        relative, shown = _followed(leave.to_crop, relative, leave)
    start, stop = source_box[:, None, :2], source_box[:, None, 2:]
    point = start + relative * (stop - start)
    start, stop = target_box[:, None, :2], target_box[:, None, 2:]
    inside = ((point > start.minimum(stop)) & (point < start.maximum(stop))).all(-1)  # (N, S)
    extent = torch.where(stop == start, 1, stop - start)  # a crop of one line has no inside, nor should it give NaN
    coordinate, inside = (point - start) * (target_grid - 1) / extent, inside & shown
    if enter is not None:
        there, found = _followed(enter.to_view, (point - start) / extent, enter)
        coordinate, inside = there * (target_grid - 1), inside & found
    coordinate = coordinate.clamp(0, target_grid - 1)
    # Deviation: a point that rounds onto the last line keeps its weight; the official code gives it none.
    first = coordinate.floor().clamp(max=max(target_grid - 2, 0))
    share = coordinate - first  # (N, S, 2)
    weight = torch.stack([1 - share, share], dim=-1)  # (N, S, 2, 2): of the first and second row, or column
    line = torch.stack([first, (first + 1).clamp(max=target_grid - 1)], dim=-1).long()
    index = (line[..., 0, :, None] * target_grid + line[..., 1, None, :]).flatten(-2)  # (N, S, 4)
    weights = (weight[..., 0, :, None] * weight[..., 1, None, :]).flatten(-2) * inside[..., None]
    own = TokenPositions(patches[..., None], inside[..., None].to(source_box.dtype))
    return own, TokenPositions(index, weights)


def _followed(
    follow: Callable[[Tensor], Followed], relative: Float[Tensor, "N S 2"], moved: PixelMap
) -> tuple[Float[Tensor, "N S 2"], Bool[Tensor, "N S"]]:
    """Rows and columns, from 0 to 1 between the middles of the outer pixels, in another picture of the same size.

    Returns:
        The places there, and whether they are shown.
    """
    span = relative.new_tensor(moved.shown.shape[:0:-1]) - 1  # width, height
    points, shown = follow(relative.flip(2) * span + 0.5)
    return ((points - 0.5) / span.clamp(min=1)).flip(2), shown


def inside_any(positions: TokenPositions) -> Bool[Tensor, "*views B S"]:
    """Which points are there at all."""
    return positions.weight.sum(-1) > 0
