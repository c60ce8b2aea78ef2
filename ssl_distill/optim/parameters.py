"""What happens to parameters around an optimiser step: grouping, the default optimiser, clipping."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ssl_distill.distributed import is_sharded, local_parts, sum_over_ranks


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: decayed tensors, and biases and other vectors that are not.

    Class tokens, position embeddings and prototype norms (K, 1) have more than one dimension and are decayed.

    Returns:
        Two optimiser groups with the keys `params`, `decayed` and `weight_decay` (0 until a schedule sets it).

    Source: DINO's official code.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_vector = name.endswith(".bias") or parameter.ndim == 1
            (undecayed if is_vector else decayed).append(parameter)
    return [
        {"params": decayed, "decayed": True, "weight_decay": 0.0},
        {"params": undecayed, "decayed": False, "weight_decay": 0.0},
    ]


def adamw(params: Iterable[Any], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW in one fused kernel per step (3 to 6 times faster on CPU too); schedules set its rate and decay."""
    return torch.optim.AdamW(params, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=True)


def clip_each_tensor(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale every gradient tensor of its own to at most `max_norm` in L2 norm, in place.

    Deviation: `torch.nn.utils.clip_grad_norm_` takes one norm over all tensors; DINO and its relatives do not.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    parts = local_parts(gradients)
    norms = torch._foreach_norm(parts)
    if is_sharded(gradients[0]):  # so are all
        norms = sum_over_ranks(torch.stack(norms).square()).sqrt().unbind()
    scales = [(max_norm / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
    torch._foreach_mul_(parts, scales)
