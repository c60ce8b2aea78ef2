"""Points averaged into the cells of dense 2-D grids, and read back."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssl_distill.lidar.batch import PointBatch

_EMPTY = 1e-6  # added to a cell's count, as in the published code


class GridIndex(NamedTuple):
    """Where points lie in the part of B grids that holds them all.

    Attributes:
        cell: Row of each point in the flattened part (B h w).
        weight: 1 over the points in the cell, 0 on padding: a sum so weighted is a mean.
        shape: B, h, w.
        corner: Row and column of the part in the whole grid.
    """

    cell: Int[Tensor, "P"]
    weight: Float[Tensor, "P"]
    shape: tuple[int, int, int]
    corner: tuple[int, int]


def grid_indices(points: PointBatch, grids: Sequence[Sequence[int]]) -> list[GridIndex]:
    """One index per projection, made once for all layers.

    Only the box of occupied cells and one cell around it is kept, cut to the grid. Two 3 x 3 convolutions that are read
    at occupied cells see nothing else: the second reads at distance 1, where the first reads zeros beyond the box.

    Args:
        points: The clouds.
        grids: Rows and columns of every projection's grid.
    """
    num_clouds, cloud = len(points.num_points), points.cloud
    columns = torch.tensor([grid[1] for grid in grids], device=points.cells.device)
    places = torch.stack([points.cells // columns, points.cells % columns])  # (2, P, A): rows and columns
    if not places.shape[1]:
        bounds = [[[0] * len(grids)] * 2] * 2
    else:
        bounds = torch.stack([places.amin(1), places.amax(1)]).tolist()  # in one transfer from the device
    real = torch.ones_like(cloud) if points.real is None else points.real
    # Counts in float32 or better: half types know no whole numbers above 2048 or 256.
    real = real.to(torch.promote_types(points.features.dtype, torch.float32))
    found = []
    for axis, grid in enumerate(grids):
        first = [max(bounds[0][i][axis] - 1, 0) for i in (0, 1)]
        size = [min(bounds[1][i][axis] + 2, grid[i]) - first[i] for i in (0, 1)]
        row, column = places[0, :, axis] - first[0], places[1, :, axis] - first[1]
        cell = (cloud * size[0] + row) * size[1] + column
        count = torch.zeros(num_clouds * size[0] * size[1], dtype=real.dtype, device=cell.device)
        weight = real / (count.index_add_(0, cell, real)[cell] + _EMPTY)
        found.append(GridIndex(cell, weight, (num_clouds, size[0], size[1]), (first[0], first[1])))
    return found


def flatten(tokens: Float[Tensor, "P C"], grid: GridIndex) -> Float[Tensor, "B C h w"]:
    """Mean of the tokens in each cell, 0 in empty ones; summed in float32, in channels-last memory."""
    weighted = tokens * grid.weight[:, None]  # promotes half types
    cells = weighted.new_zeros(grid.shape[0] * grid.shape[1] * grid.shape[2], tokens.shape[1])
    cells = cells.index_add(0, grid.cell, weighted)
    return cells.to(tokens.dtype).view(*grid.shape, -1).permute(0, 3, 1, 2)


def inflate(cells: Float[Tensor, "B C h w"], grid: GridIndex) -> Float[Tensor, "P C"]:
    """What each point's cell holds."""
    return cells.permute(0, 2, 3, 1).flatten(0, 2)[grid.cell]
