"""Teacher targets that remember a running mean."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_distill.distributed import sum_over_ranks


def over_samples(total: Float[Tensor, "1 _"]) -> Float[Tensor, "1 _"]:
    """Weighted sum of logits and sum of weights over all ranks: every sample counts the same."""
    return sum_over_ranks(total)


def over_ranks(total: Float[Tensor, "1 _"]) -> Float[Tensor, "1 _"]:
    """The same with each rank's mean counted once, as in UDI's official code; a rank without samples is left out."""
    weight = total[:, -1:]
    return sum_over_ranks(torch.where(weight > 0, total / weight, 0))


class Center(nn.Module):
    """Running mean of teacher logits; subtracting it keeps one prototype from winning everywhere.

    `observe` collects the logits of a batch, `update` moves the center: once per optimiser step, so that gradient
    accumulation over n batches equals one batch n times as large.

    Args:
        num_prototypes: K, the length of a row of logits.
        momentum: Share of the old center in an update.
        average: From this rank's sums to those that the mean is taken of: `over_samples` or `over_ranks`.

    It stays in float32 where the rest is moved to half precision, in which it would not move.

    Source: DINO (arXiv 2104.14294), eq. 4; weights as in UDI (arXiv 2407.17671).
    """

    value: Tensor
    observed: Tensor

    def __init__(
        self, num_prototypes: int, momentum: float = 0.9, average: Callable[[Tensor], Any] = over_samples
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"`momentum` must lie in [0, 1], got {momentum}.")
        self.momentum = momentum
        self.average = average
        self.register_buffer("value", torch.zeros(1, num_prototypes))
        self.register_buffer("observed", torch.zeros(1, num_prototypes + 1), persistent=False)  # sum, weight

    @torch.no_grad()
    def forward(self, logits: Float[Tensor, "*rows K"], temperature: float) -> Float[Tensor, "*rows K"]:
        """Targets: centred and sharpened teacher probabilities, in float32 or better."""
        logits = logits.to(torch.promote_types(logits.dtype, self.value.dtype))
        return ((logits - self.value) / temperature).softmax(-1)

    @torch.no_grad()
    def observe(self, logits: Float[Tensor, "*rows K"]) -> None:
        """Collect these logits for the next `update`; a rank may have no rows."""
        rows = logits.flatten(0, -2)
        self.observe_sum(rows.sum(0, dtype=self.value.dtype), len(rows))

    @torch.no_grad()
    def observe_sum(self, weighted_sum: Float[Tensor, "K"], weight: Float[Tensor, ""] | int) -> None:
        """Collect rows that count differently, by their weighted sum and the sum of their weights."""
        self.observed[:, :-1] += weighted_sum
        self.observed[:, -1] += weight

    @torch.no_grad()
    def update(self) -> None:
        """Move the center towards the mean of what all ranks observed; without any it stays."""
        total = self.average(self.observed)
        weight = total[:, -1:]
        mean = torch.where(weight > 0, total[:, :-1] / weight, self.value)
        self.value.lerp_(mean, 1 - self.momentum)
        self.observed.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Center":
        """Follow to another device, and to no precision below float32."""
        old = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():
            before = old[name]
            if before is not None and moved is not None and torch.finfo(moved.dtype).bits < 32:
                self._buffers[name] = before.to(moved.device)
        return self
