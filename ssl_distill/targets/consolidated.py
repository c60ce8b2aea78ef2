"""Targets with several modes: what a teacher says of an image, blended with what it says of points in it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_distill.targets.center import Center, over_samples

Linear = Callable[[Tensor], Tensor]
_EPS = 1e-5  # keeps the mean of no points finite


class PatchVectors(NamedTuple):
    """Teacher vectors at sampled points, as the prototypes take them.

    Attributes:
        vectors: One per point.
        weight: How much of the point lies in the teacher's crop: 1, or 0 where it does not.
    """

    vectors: Float[Tensor, "*crops S b"]
    weight: Float[Tensor, "*crops S"]

    @property
    def total(self) -> Float[Tensor, "*crops"]:
        """Sum of weights."""
        return self.weight.sum(-1)

    @property
    def sum(self) -> Float[Tensor, "*crops b"]:
        """Weighted sum of vectors."""
        return _weighted_sum(self.weight, self.vectors)


class ConsolidatedTargets(NamedTuple):
    """Teacher probabilities of every level.

    Attributes:
        class_targets: Of global crops; their class tokens alone.
        plus_global: Blended, for the other global crop of the student: row 0 is from crop 1.
        plus_local: Blended for each local crop, summed over the two global crops.
        patch_targets: Of points of the student's global crops; row 0 is seen from crop 1.
    """

    class_targets: Float[Tensor, "2 B K"]
    plus_global: Float[Tensor, "2 B K"]
    plus_local: Float[Tensor, "L B K"]
    patch_targets: Float[Tensor, "2 B S K"]


def class_where_empty(total: Float[Tensor, "*crops"], alpha: float) -> Float[Tensor, "*crops"]:
    """Share of the points: none where there are no points, so that the image's target is left as it is."""
    return torch.where(total > 0, alpha, 0.0).to(total.dtype)


def shrink_where_empty(total: Float[Tensor, "*crops"], alpha: float) -> Float[Tensor, "*crops"]:
    """The same share everywhere: without points the image's logits shrink, as in UDI's official code."""
    return torch.full_like(total, alpha)


def blend_logits(
    class_logits: Float[Tensor, "*crops K"],
    points: PatchVectors,
    share: Float[Tensor, "*crops"],
    prototypes: Linear,
    center: Center,
    patch_center: Center,
    temperature: float,
) -> tuple[Float[Tensor, "*crops K"], Float[Tensor, "*crops K"]]:
    """Logits of image and points are averaged, then centred and sharpened; the official code's way.

    Prototypes are linear, so the logits of the mean vector are the mean of the logits.

    Args:
        class_logits: Of the image.
        points: In the same crops.
        share: Of the points in the blend.
        prototypes: Linear map from vectors to logits.
        center: Of blended logits.
        patch_center: Of logits of points; used by other blends.
        temperature: Of the softmax.

    Returns:
        Targets, and the blended logits that the center is to remember.
    """
    profile = prototypes(points.sum / (points.total + _EPS)[..., None].to(points.vectors.dtype)).to(class_logits.dtype)
    share = share[..., None].to(class_logits.dtype)
    blended = share * profile + (1 - share) * class_logits
    return center(blended, temperature), blended


def blend_probabilities(
    class_logits: Float[Tensor, "*crops K"],
    points: PatchVectors,
    share: Float[Tensor, "*crops"],
    prototypes: Linear,
    center: Center,
    patch_center: Center,
    temperature: float,
) -> tuple[Float[Tensor, "*crops K"], Float[Tensor, "*crops K"]]:
    """Distributions of image and points are averaged, as the paper's figure draws it; arguments as for `blend_logits`.

    It makes the logits of all points, S times the memory.
    """
    _, blended = blend_logits(class_logits, points, share, prototypes, center, patch_center, temperature)
    of_points = patch_center(prototypes(points.vectors), temperature)
    profile = _weighted_sum(points.weight / (points.total + _EPS)[..., None], of_points)
    share = share[..., None].to(of_points.dtype)
    return share * profile + (1 - share) * center(class_logits, temperature), blended


def _weighted_sum(weight: Tensor, rows: Tensor) -> Tensor:
    """Sum over S of (..., S) times (..., S, K); not by einsum, which autocast rounds."""
    return (weight[..., None].to(rows.dtype) * rows).sum(-2)


class Consolidation(nn.Module):
    """Makes the targets of all levels, and remembers a center for each.

    Args:
        num_prototypes: K.
        momentum: Share of the old centers in an update.
        alpha: Share of the points in a blend.
        blend: `blend_logits` or `blend_probabilities`.
        empty_share: Share of the points by their number: `class_where_empty` or `shrink_where_empty`.
        average: How ranks share the center of points: `over_samples` or `over_ranks`.

    Source: UDI (arXiv 2407.17671), consolidated profile.
    """

    def __init__(
        self,
        num_prototypes: int,
        momentum: float = 0.9,
        alpha: float = 0.5,
        blend: Callable[..., tuple[Tensor, Tensor]] = blend_logits,
        empty_share: Callable[[Tensor, float], Any] = class_where_empty,
        average: Callable[[Tensor], Any] = over_samples,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` must lie in [0, 1], got {alpha}.")
        self.class_center = Center(num_prototypes, momentum)
        self.plus_center = Center(num_prototypes, momentum)
        self.patch_center = Center(num_prototypes, momentum, average)
        self.alpha = alpha
        self.blend = blend
        self.empty_share = empty_share

    @torch.no_grad()
    def forward(
        self,
        class_logits: Float[Tensor, "2 B K"],
        points: PatchVectors,
        local_points: PatchVectors,
        prototypes: Linear,
        temperature: float,
    ) -> ConsolidatedTargets:
        """Targets by the centers of earlier steps; what is to move them is noted for `update`.

        Args:
            class_logits: Of the teacher's crops, global crop 1 first.
            points: Points of the student's global crops (2, B, S), in the same order: those of crop 0 lie in crop 1.
            local_points: Points of each local crop (L, 2, B, s), in global crop 1 and in global crop 0.
            prototypes: Linear map from vectors to logits.
            temperature: Of the softmax.
        """
        plus_global = self._blended(class_logits, points, prototypes, temperature)
        plus_local = [
            self._blended(class_logits, PatchVectors(*of_crop), prototypes, temperature).sum(0)
            for of_crop in zip(*local_points, strict=True)
        ]
        targets = ConsolidatedTargets(
            self.class_center(class_logits, temperature).flip(0),
            plus_global,
            torch.stack(plus_local) if plus_local else plus_global.new_empty(0, *plus_global.shape[1:]),
            self.patch_center(prototypes(points.vectors), temperature),
        )
        self.class_center.observe(class_logits)
        for each in (points, local_points):
            total = each.sum.flatten(0, -2).sum(0)
            self.patch_center.observe_sum(prototypes(total), each.total.sum())
        return targets

    def _blended(
        self, class_logits: Tensor, points: PatchVectors, prototypes: Linear, temperature: float
    ) -> Float[Tensor, "2 B K"]:
        share = self.empty_share(points.total, self.alpha)
        # Order matters: all blends of a batch use the center from before it; `observe` does not move it.
        targets, blended = self.blend(
            class_logits, points, share, prototypes, self.plus_center, self.patch_center, temperature
        )
        self.plus_center.observe(blended)
        return targets

    def update(self) -> None:
        """Move all centers; once per optimiser step."""
        for center in (self.class_center, self.plus_center, self.patch_center):
            center.update()
