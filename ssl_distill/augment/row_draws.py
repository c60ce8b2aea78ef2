"""Random numbers of an image's own, for code that draws them from torch's generators for a whole batch."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_distill.draws import Draws


class DrawForBatch(Exception):
    """A random number was asked for that belongs to no image."""


class RowDraws(TorchDispatchMode):
    """While active, row b of every random tensor with a row per image follows from `key[b]` alone.

    The generators are left as they were.

    Args:
        key: A number for every image.

    Raises:
        DrawForBatch: Where a draw is not of that shape, or of another law than uniform and normal.
    """

    def __init__(self, key: Int[Tensor, "B"]) -> None:
        super().__init__()
        self.key = key
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Answer draws; do everything else."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        law = _LAWS.get(func)
        if law is None or not args[0] or args[0][0] != len(self.key):
            raise DrawForBatch(f"{func}{args}")
        rows = law(Draws(0, self.number), self.key, math.prod(args[0][1:]))
        self.number += 1
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        return rows.view(args[0]).to(device=kwargs.get("device") or "cpu", dtype=dtype)


def _uniform(draws: Draws, key: Tensor, count: int) -> Tensor:
    return draws.uniform(key, 0, count)


def _normal(draws: Draws, key: Tensor, count: int) -> Tensor:
    radius, angle = (draws.uniform(key, stream, count) for stream in (0, 1))
    return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)  # Box and Muller


_LAWS = {torch.ops.aten.rand.default: _uniform, torch.ops.aten.randn.default: _normal}


def image_keys(uniform: Float[Tensor, "B draws"]) -> Int[Tensor, "B"]:
    """One number of 48 bits for every image, from its first two of 24 bits."""
    first, second = (uniform[:, :2] * 2**24).long().unbind(1)
    return first * 2**24 + second
