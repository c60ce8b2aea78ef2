"""How far point features are from the features they should equal."""

import torch
from jaxtyping import Float
from torch import Tensor

_SMALLEST = 1e-12


def point_distance(
    student: Float[Tensor, "M D"], teacher: Float[Tensor, "M D"], num_pairs: Tensor | int | None = None
) -> Float[Tensor, ""]:
    """Mean distance of unit vectors, not squared: the square root of 2 - 2 cos.

    Its gradient does not fade near the optimum. Equal vectors get none, and neither does a student vector of length 0,
    whose direction means nothing.

    Args:
        student: Features of points.
        teacher: Features of their pixels.
        num_pairs: What the sum is divided by: the mean number of pairs per rank, if ranks have different numbers.
            None is M.

    Returns:
        Scalar between 0 and 2; 0 where there are no pairs.

    Source: ScaLR (arXiv 2310.17504), by its published code.
    """
    ours, theirs = unit(student), unit(teacher)
    distance = torch.linalg.vector_norm(ours - theirs, dim=1)
    return _mean(distance, num_pairs)


def squared_point_distance(
    student: Float[Tensor, "M D"], teacher: Float[Tensor, "M D"], num_pairs: Tensor | int | None = None
) -> Float[Tensor, ""]:
    """Mean squared distance of unit vectors, 2 - 2 cos; arguments as in `point_distance`."""
    return _mean((unit(student) - unit(teacher)).square().sum(1), num_pairs)


def cosine_point_distance(
    student: Float[Tensor, "M D"], teacher: Float[Tensor, "M D"], num_pairs: Tensor | int | None = None
) -> Float[Tensor, ""]:
    """Mean of 1 - cos; arguments as in `point_distance`."""
    return _mean(1 - (unit(student) * unit(teacher)).sum(1), num_pairs)


def shuffled_point_distance(
    student: Float[Tensor, "M D"], teacher: Float[Tensor, "M D"], num_pairs: Tensor | int | None = None
) -> Float[Tensor, ""]:
    """The control: every point learns a pixel of some other point. What it gains is not from the pairs.

    Arguments as in `point_distance`.
    """
    return point_distance(student, teacher[torch.randperm(len(teacher), device=teacher.device)], num_pairs)


def unit(rows: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
    """Rows of length 1 in float32 or better; rows of length 0 stay, and get no gradient.

    Deviation: the usual division by max(norm, 1e-12) blows the gradient of such a row up by 1e12.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    short = norm < _SMALLEST
    return torch.where(short, torch.zeros_like(rows), rows / norm.masked_fill(short, 1.0))


def _mean(values: Tensor, num_pairs: Tensor | int | None) -> Tensor:
    count = len(values) if num_pairs is None else num_pairs
    return values.sum() / torch.as_tensor(count, device=values.device).clamp(min=1)
