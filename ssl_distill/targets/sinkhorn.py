"""Teacher targets that use every prototype equally often within a batch."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_distill.distributed import max_over_ranks, sum_over_ranks


class SinkhornKnopp(nn.Module):
    """Targets by Sinkhorn-Knopp over the teacher rows of all ranks: the alternative to `Center`, without memory.

    Args:
        num_prototypes: Unused; every kind of targets is made from it.
        num_iterations: Alternations between prototypes and rows.

    Source: SwAV (arXiv 2006.09882), section 3.1, as in DINOv2 (arXiv 2304.07193), section 4.
    """

    def __init__(self, num_prototypes: int, num_iterations: int = 3) -> None:
        super().__init__()
        if num_iterations < 1:
            raise ValueError(f"`num_iterations` must be at least 1, got {num_iterations}.")
        self.num_iterations = num_iterations

    @torch.no_grad()
    def forward(self, logits: Float[Tensor, "*rows K"], temperature: float) -> Float[Tensor, "*rows K"]:
        """Targets whose rows sum to 1 and whose prototypes are equally used, in float32 or better."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2) / temperature
        # Deviation: the largest score is subtracted first. The result is the same and cannot overflow.
        plan = (scores - max_over_ranks(scores.max())).exp()  # (rows, K)
        for _ in range(self.num_iterations):
            plan /= sum_over_ranks(plan.sum(0, keepdim=True))
            plan /= plan.sum(1, keepdim=True)
        return plan.view(logits.shape)

    def observe(self, logits: Float[Tensor, "*rows K"]) -> None:
        """Nothing to remember: the batch balances itself."""

    def update(self) -> None:
        """Nothing to remember."""
