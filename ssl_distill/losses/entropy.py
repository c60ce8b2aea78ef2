"""Entropy, how far a batch is spread, and reconstruction, how well one view tells another.

Their difference is a lower bound of what two views say of each other. On the unit sphere the density is estimated from
the batch itself with von Mises-Fisher kernels; over prototypes it is the mean output.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ssl_distill.distributed import gather_rows, mean_over_ranks, rank, world_size
from ssl_distill.losses.von_mises_fisher import log_normalizer


def leave_one_out_entropy(unit: Float[Tensor, "B D"], concentration: float = 10.0) -> Float[Tensor, ""]:
    """Entropy of the density of unit rows, each row's density estimated from all others: nearly without bias.

    Args:
        unit: Rows of length 1, at least two over all ranks. Rows of all ranks are taken together.
        concentration: Of the kernels; higher is narrower.

    Returns:
        Scalar in nats, in float32 or better.

    Raises:
        ValueError: If there is only one row.
    """
    cosines = _cosines(unit)
    if len(cosines) < 2:
        raise ValueError("`unit` must hold at least 2 rows, each of which is judged by the others, got 1.")
    others = (concentration * cosines).fill_diagonal_(-math.inf)
    log_density = others.logsumexp(1) - math.log(len(cosines) - 1)
    return log_normalizer(unit.shape[1], concentration) - log_density.mean()


def resubstitution_entropy(unit: Float[Tensor, "B D"], concentration: float = 10.0) -> Float[Tensor, ""]:
    """The same with every row among those that its own density is estimated from (`average` in the official code).

    Rows that are nearly orthogonal mostly see themselves: it pushes hard only where the batch is about to collapse.

    Source: Joe (1989), as in entropy and reconstruction (ICML 2023), its official code.
    """
    return log_normalizer(unit.shape[1], concentration) - _log_densities(unit, concentration).mean()


def plug_in_entropy(unit: Float[Tensor, "B D"], concentration: float = 10.0) -> Float[Tensor, ""]:
    """As `resubstitution_entropy`, but dense rows weigh more (`expectation` in the official code, its default)."""
    log_density = _log_densities(unit, concentration)
    return log_normalizer(unit.shape[1], concentration) - (log_density.softmax(0) * log_density).sum()


def sphere_reconstruction(
    first: Float[Tensor, "B D"], second: Float[Tensor, "B D"], concentration: float = 10.0
) -> Float[Tensor, ""]:
    """Mean negative log-density of one view's unit rows around those of the other; symmetric."""
    cosines = (_at_least_float32(first) * _at_least_float32(second)).sum(1)
    return log_normalizer(first.shape[1], concentration) - concentration * cosines.mean()


def mean_output_entropy(logits: Float[Tensor, "B K"], eps: float = 0.0) -> Float[Tensor, ""]:
    """Entropy of the mean over rows, of all ranks, of their softmax: ln K where all prototypes are used alike.

    B rows cannot show more than ln B nats beyond what each row's own softmax has.

    Args:
        logits: Divided by the temperature.
        eps: Added before the logarithm; 1e-7 is the official code.

    Returns:
        Scalar in nats, in float32 or better.
    """
    own = _at_least_float32(logits).softmax(1).mean(0)
    # Order matters: the value is that of all ranks, the gradient of this rank's share, times their number for DDP.
    mean = own + (mean_over_ranks(own) - own).detach()
    return -(mean * (mean.clamp(min=torch.finfo(mean.dtype).tiny) + eps).log()).sum()


def output_reconstruction(
    first: Float[Tensor, "B K"], second: Float[Tensor, "B K"], eps: float = 0.0
) -> Float[Tensor, ""]:
    """Mean cross-entropy of each view's softmax under the other's; symmetric, with gradient to both.

    Args:
        first: Logits of one view, divided by the temperature.
        second: Of the other.
        eps: Added before the logarithm; 1e-7 is the official code.
    """
    first, second = _at_least_float32(first), _at_least_float32(second)
    pairs = ((first, second), (second, first))
    return -sum(((a.softmax(1) * _log_softmax(b, eps)).sum(1).mean() for a, b in pairs), first.new_zeros(())) / 2


class SphereEntropy(nn.Module):
    """Weighted entropy of a student's features on the unit sphere, to be minimised: more spread is less loss.

    Args:
        weight: Factor of the term.
        concentration: Of the kernels.
        estimator: From unit rows (B, D) and the concentration: `leave_one_out_entropy`, `resubstitution_entropy` or
            `plug_in_entropy`.

    Source: entropy and reconstruction (ICML 2023); where it is attached is ours.
    """

    def __init__(
        self,
        weight: float = 1.0,
        concentration: float = 10.0,
        estimator: Callable[[Tensor, float], Any] = leave_one_out_entropy,
    ) -> None:
        super().__init__()
        if concentration <= 0:
            raise ValueError(f"`concentration` must be positive, got {concentration}.")
        self.weight = _checked_weight(weight)
        self.concentration = concentration
        self.estimator = estimator

    def forward(self, features: Float[Tensor, "V B D"]) -> Float[Tensor, ""]:
        """Mean over views, each estimated for itself: an image's own views are no neighbours.

        Raises:
            ValueError: If no gradient flows into the features, as into a teacher's.
        """
        _check_gradient("features", features)
        unit = F.normalize(_at_least_float32(features), dim=-1)
        return -self.weight * torch.stack([self.estimator(view, self.concentration) for view in unit]).mean()


class OutputEntropy(nn.Module):
    """Weighted entropy of a student's mean output, to be minimised: more prototypes in use is less loss.

    Args:
        weight: Factor of the term.

    Source: entropy and reconstruction (ICML 2023), discrete variant; where it is attached is ours.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = _checked_weight(weight)

    def forward(self, logits: Float[Tensor, "V B K"]) -> Float[Tensor, ""]:
        """Mean over views.

        Args:
            logits: Divided by the temperature.

        Raises:
            ValueError: If no gradient flows into the logits, as into a teacher's.
        """
        _check_gradient("logits", logits)
        return -self.weight * torch.stack([mean_output_entropy(view) for view in logits]).mean()


def _cosines(unit: Float[Tensor, "B D"]) -> Float[Tensor, "N N"]:
    """Cosines between the rows of all ranks."""
    rows = _rows_of_all_ranks(_at_least_float32(unit))
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ rows.T


def _log_densities(unit: Float[Tensor, "B D"], concentration: float) -> Float[Tensor, "N"]:
    """Logarithm of every row's density without its normaliser, the row itself among the kernels."""
    cosines = _cosines(unit)
    return (concentration * cosines).logsumexp(1) - math.log(len(cosines))


def _rows_of_all_ranks(rows: Float[Tensor, "B D"]) -> Float[Tensor, "N D"]:
    """Rows in rank order; the gradient into this rank's is multiplied by the number of ranks, which DDP divides by."""
    if world_size() == 1:
        return rows
    counts = gather_rows(torch.tensor([len(rows)], device=rows.device))
    start = int(counts[: rank()].sum())
    everyone = gather_rows(rows)
    own = rows.detach() + world_size() * (rows - rows.detach())
    return torch.cat([everyone[:start], own, everyone[start + len(rows) :]])


def _log_softmax(logits: Float[Tensor, "B K"], eps: float) -> Float[Tensor, "B K"]:
    return (logits.softmax(1) + eps).log() if eps else logits.log_softmax(1)


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _checked_weight(weight: float) -> float:
    if weight < 0:
        raise ValueError(f"`weight` must be at least 0 (a negative one rewards collapse), got {weight}.")
    return weight


def _check_gradient(name: str, value: Tensor) -> None:
    if torch.is_grad_enabled() and not value.requires_grad:
        raise ValueError(f"`{name}` must be the student's: no gradient flows into these, and the term had no effect.")
