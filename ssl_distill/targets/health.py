"""Numbers that tell a learning run from a collapsing one."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def output_health(
    targets: Float[Tensor, "T B K"],
    loss: Float[Tensor, ""],
    features: Float[Tensor, "V B D"],
    center: Tensor | None = None,
) -> dict[str, Tensor]:
    """Entropies in nats, prototype use and feature spread of one batch.

    Args:
        targets: Teacher probabilities.
        loss: Cross-entropy of the student against them.
        features: Backbone features of the student.
        center: Running mean of the logits, if targets are centred.

    Returns:
        `teacher_entropy` (mean over images; ln K: uniform, 0: one-hot), `mean_output_entropy` (of the mean over
        images; 0: all images share one prototype), `kl` (of the student from the teacher), `max_probability`,
        `prototypes_used` (share of rows whose winner is another than every earlier row's), `feature_std` (per
        dimension of the unit features, times sqrt(D): 1 is spread over the sphere, 0 is constant), `center_norm`.
    """
    rows = targets.flatten(0, -2)
    teacher_entropy = torch.special.entr(rows).sum(-1).mean()
    unit = F.normalize(features[0].float(), dim=-1)
    health = {
        "teacher_entropy": teacher_entropy,
        "mean_output_entropy": torch.special.entr(rows.mean(0)).sum(),
        "kl": loss - teacher_entropy,
        "max_probability": rows.amax(-1).mean(),
        "prototypes_used": rows.argmax(-1).unique().numel() / torch.tensor(float(min(rows.shape))),
        "feature_std": unit.std(0, correction=0).mean() * unit.shape[-1] ** 0.5,
    }
    if center is not None:
        health["center_norm"] = center.norm()
    return health
