"""Batches of point clouds, ragged: all points in one row after the other, nothing padded."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class PointBatch(NamedTuple):
    """What a point network eats: P points of B clouds, the clouds one after the other.

    Attributes:
        features: Columns as `preparation.feature_columns` makes them.
        cells: Flat cell of each point in its cloud's own grid, for each of A projections.
        neighbors: Rows of the nearest points, ascending by distance; the first is the point itself.
        num_points: Points of each cloud.
        real: False where a row is padding, which `PaddedClouds.flat` keeps for parity; None where there is none.
    """

    features: Float[Tensor, "P F"]
    cells: Int[Tensor, "P A"]
    neighbors: Int[Tensor, "P K"]
    num_points: Int[Tensor, "B"]
    real: Bool[Tensor, "P"] | None = None

    @property
    def cloud(self) -> Int[Tensor, "P"]:
        """Number of the cloud that each point belongs to."""
        numbers = torch.arange(len(self.num_points), device=self.num_points.device)
        return numbers.repeat_interleave(self.num_points, output_size=len(self.features))


def join_clouds(clouds: Sequence[PointBatch]) -> PointBatch:
    """Several batches as one; neighbours are renumbered."""
    starts = [0]
    for cloud in clouds:
        starts.append(starts[-1] + len(cloud.features))
    return PointBatch(
        torch.cat([cloud.features for cloud in clouds]),
        torch.cat([cloud.cells for cloud in clouds]),
        torch.cat([cloud.neighbors + start for cloud, start in zip(clouds, starts, strict=False)]),
        torch.cat([cloud.num_points for cloud in clouds]),
    )


class PaddedClouds(NamedTuple):
    """The official layout: every cloud padded to N points.

    Attributes:
        features: 0 on padding.
        cells: 0 on padding.
        neighbors: Numbers inside the cloud, the point itself first; N - 1 on padding.
        real: True on points, False on padding.
    """

    features: Float[Tensor, "B F N"]
    cells: Int[Tensor, "B A N"]
    neighbors: Int[Tensor, "B K N"]
    real: Bool[Tensor, "B N"]

    def ragged(self) -> PointBatch:
        """Without the padding: results do not depend on who is in the batch."""
        flat = self.flat()
        assert flat.real is not None
        new_row = flat.real.cumsum(0) - 1  # (B * N,)
        features, cells, neighbors = (part[flat.real] for part in flat[:3])
        return PointBatch(features, cells, new_row[neighbors], self.real.sum(1))

    def flat(self) -> PointBatch:
        """With the padding as points that no grid counts, but every batch norm does: parity with published networks."""
        clouds, _, num_points = self.features.shape
        start = num_points * torch.arange(clouds, device=self.cells.device)[:, None, None]
        return PointBatch(
            self.features.transpose(1, 2).flatten(0, 1),
            self.cells.transpose(1, 2).flatten(0, 1),
            (self.neighbors.transpose(1, 2) + start).flatten(0, 1),
            torch.full((clouds,), num_points, device=self.cells.device),
            self.real.flatten(),
        )


def pad_clouds(points: PointBatch, num_points: int | None = None) -> PaddedClouds:
    """A ragged batch in the official layout.

    Args:
        points: Without padding.
        num_points: N; None is the longest cloud's length.

    Raises:
        ValueError: If a cloud has more than N points.
    """
    counts = points.num_points.tolist()
    longest = max(counts)
    size = longest if num_points is None else num_points
    if size < longest:
        raise ValueError(f"`num_points` must be at least {longest}, the longest cloud's points, got {size}.")
    features = points.features.new_zeros(len(counts), points.features.shape[1], size)
    cells = points.cells.new_zeros(len(counts), points.cells.shape[1], size)
    neighbors = points.neighbors.new_full((len(counts), points.neighbors.shape[1], size), size - 1)
    real = torch.zeros(len(counts), size, dtype=torch.bool, device=points.cells.device)
    start = 0
    for i, count in enumerate(counts):
        rows = slice(start, start + count)
        features[i, :, :count] = points.features[rows].T
        cells[i, :, :count] = points.cells[rows].T
        neighbors[i, :, :count] = points.neighbors[rows].T - start
        real[i, :count] = True
        start += count
    return PaddedClouds(features, cells, neighbors, real)
