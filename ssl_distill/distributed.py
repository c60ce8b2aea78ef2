"""Statistics over all ranks; each function is the identity on one process."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 outside `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 outside `torch.distributed`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """Element-wise sum over ranks, without gradient. The input is left as it is."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def max_over_ranks(value: Tensor) -> Tensor:
    """Element-wise maximum over ranks, without gradient. The input is left as it is."""
    if world_size() == 1:
        return value
    largest = value.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def mean_over_ranks(value: Tensor) -> Tensor:
    """Element-wise mean over ranks, without gradient. The input is left as it is."""
    return sum_over_ranks(value) / world_size()


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks in rank order; ranks may hold different numbers of rows, also none.

    Args:
        rows: Shape (n, ...); everything after the first dimension is equal on all ranks.

    Returns:
        Shape (sum of n, ...), without gradient.
    """
    if world_size() == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    longest = int(torch.stack(counts).max())
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows.detach()
    gathered = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(n)] for part, n in zip(gathered, counts, strict=True)])


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of each tensor: its shard if it is sharded, else all of it. No copies."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose class takes long to import."""
    return hasattr(tensor, "to_local")
