"""Losses and scores of classes predicted for every point."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from ssl_distill.lidar.frames import IGNORED


def segmentation_loss(
    logits: Float[Tensor, "R C"], labels: Int[Tensor, "R"], lovasz_weight: float = 1.0
) -> Float[Tensor, ""]:
    """Cross-entropy plus Lovász-softmax over the points with a known class; 0 where there is none.

    Source: WaffleIron (arXiv 2301.10100), by its published code.
    """
    known = labels != IGNORED
    logits = logits[known].to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels[known]
    if not len(labels):
        return logits.sum()
    return F.cross_entropy(logits, labels) + lovasz_weight * lovasz_softmax(logits.softmax(1), labels)


def lovasz_softmax(probabilities: Float[Tensor, "R C"], labels: Int[Tensor, "R"]) -> Float[Tensor, ""]:
    """Convex surrogate of 1 - IoU, averaged over the classes that have a label.

    Args:
        probabilities: Rows sum to 1.
        labels: All known; at least one.

    Source: Lovász-softmax (arXiv 1705.08790), algorithm 1.
    """
    losses = []
    for label in labels.unique():
        foreground = (labels == label).to(probabilities.dtype)
        errors = (foreground - probabilities[:, label]).abs()
        errors, order = errors.sort(descending=True, stable=True)
        found = foreground[order].cumsum(0)
        total = found[-1]
        union = total + torch.arange(1, len(found) + 1, device=found.device) - found
        jaccard = 1 - (total - found) / union
        weights = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
        losses.append(errors @ weights)
    return torch.stack(losses).mean()


def segmentation_scores(num_classes: int) -> MetricCollection:
    """Scores of the points with a known class, of all ranks, from predicted classes and labels.

    Computed are `iou` (C,), NaN for a class that is neither there nor predicted, `miou`, its mean over the others, and
    `accuracy` of all points.

    Args:
        num_classes: C; labels are 0 ... C - 1, or 255.
    """
    arguments: dict[str, Any] = {"num_classes": num_classes, "ignore_index": IGNORED, "validate_args": False}
    return MetricCollection(
        {
            "iou": MulticlassJaccardIndex(average="none", zero_division=math.nan, **arguments),
            "miou": MulticlassJaccardIndex(average="macro", **arguments),
            "accuracy": MulticlassAccuracy(average="micro", **arguments),
        },
        # Said and not found out by the first update, which a rank without a scan never makes.
        compute_groups=[["iou", "miou"], ["accuracy"]],
    )
