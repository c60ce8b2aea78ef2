"""A linear classifier of points on a frozen network."""

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_distill.lidar.batch import PointBatch


@torch.no_grad()
def calibrated(network: nn.Module, batches: Iterable[PointBatch]) -> nn.Module:
    """A copy whose batch norms know the mean statistics of these batches; weights are not touched."""
    network = copy.deepcopy(network)
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
    network.train()
    for batch in batches:
        network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network


def fit_point_probe(
    tokens: Float[Tensor, "N C"],
    labels: Int[Tensor, "N"],
    num_classes: int,
    steps: int = 600,
    points_per_step: int = 8192,
    learning_rate: float = 1e-2,
) -> nn.Sequential:
    """Batch norm and a linear layer that starts at 0, by AdamW and cross-entropy, in eval mode.

    Args:
        tokens: What a frozen network says of points.
        labels: Their classes, all known.
        num_classes: Labels are 0 ... num_classes - 1.
        steps: Optimiser steps.
        points_per_step: Points in each, drawn with replacement, always the same.
        learning_rate: Constant.
    """
    generator = torch.Generator().manual_seed(0)
    # Validation runs in inference mode, whose tensors no gradient can be taken through: hence the clones.
    with torch.inference_mode(False), torch.enable_grad():
        tokens, labels = tokens.clone(), labels.clone()
        probe = linear_head(tokens.shape[1], num_classes).to(tokens.device)
        optimizer = torch.optim.AdamW(probe.parameters(), learning_rate)
        for _ in range(steps):
            rows = torch.randint(len(tokens), (points_per_step,), generator=generator).to(tokens.device)
            optimizer.zero_grad()
            F.cross_entropy(probe(tokens[rows]), labels[rows]).backward()
            optimizer.step()
    return probe.eval()


def linear_head(num_features: int, num_classes: int) -> nn.Sequential:
    """Batch norm, then a linear layer that starts at 0."""
    linear = nn.Linear(num_features, num_classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(num_features), linear)
