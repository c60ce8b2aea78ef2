"""Cross-entropy against targets that are made for each pair of crops, or for points in them."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ssl_distill.distributed import mean_over_ranks
from ssl_distill.losses.row_entropy import row_entropy


def paired_entropy(
    global_targets: Float[Tensor, "2 B K"],
    local_targets: Float[Tensor, "L B K"],
    logits: Float[Tensor, "V B K"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean cross-entropy over all pairs of a student's crop and another, global crop of the teacher.

    As `cross_view_entropy`, where each pair has a target of its own.

    Args:
        global_targets: For the student's global crops, from the other one.
        local_targets: For its local crops, the sum of those from both global crops: the entropy is linear in them.
        logits: Of all crops of the student, global ones first.
        temperature: The logits are divided by it.

    Returns:
        Scalar in nats.

    Raises:
        ValueError: If there are not as many targets as crops.

    Source: UDI (arXiv 2407.17671), its official code.
    """
    targets = torch.cat([global_targets, local_targets])
    if len(targets) != len(logits):
        raise ValueError(f"`logits` must have one stack for each of {len(targets)} crops, got {len(logits)}.")
    num_pairs = len(global_targets) + 2 * len(local_targets)
    rows = targets.flatten(0, 1) / (num_pairs * targets.shape[1])
    return row_entropy(rows, logits.flatten(0, 1), temperature)


def point_entropy(
    targets: Float[Tensor, "M K"],
    logits: Float[Tensor, "M K"],
    there: Bool[Tensor, "*points"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean cross-entropy over those points that are there, over all ranks; 0 without any.

    Deviation: the official code divides by each rank's own number of points, which counts the points of a rank with few
    of them for more, and by 0 where there are none.

    Args:
        targets: Teacher probabilities of the M points.
        logits: Student logits of the same points.
        there: Which of all points they are; M of them are True.
        temperature: The logits are divided by it.

    Returns:
        Scalar in nats; its mean over ranks is the mean over all points.

    Raises:
        ValueError: If there are not as many rows as points.

    Source: UDI (arXiv 2407.17671), its official code.
    """
    count = there.sum()
    if len(logits) != count:
        raise ValueError(f"`logits` must have one row for each of {int(count)} points, got {len(logits)}.")
    count = mean_over_ranks(count.to(targets.dtype))
    return row_entropy(targets / count, logits, temperature)
