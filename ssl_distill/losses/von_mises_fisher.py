"""The normalising constant of the von Mises-Fisher density on the unit sphere."""

import math
from functools import lru_cache

import torch


def log_bessel(order: float, argument: float) -> float:
    """Logarithm of the modified Bessel function of the first kind.

    Deviation: by its power series in logarithms, because scipy's `ive` is 0 at the large orders that are needed here,
    and adding a small number before the logarithm, as the official code does, is wrong from some 40 dimensions on.
    """
    m = torch.arange(2 * math.ceil(argument) + 60, dtype=torch.float64)  # the largest term is at m < argument / 2
    terms = (2 * m + order) * math.log(argument / 2) - torch.lgamma(m + 1) - torch.lgamma(m + order + 1)
    return float(terms.logsumexp(0))


@lru_cache
def log_normalizer(dim: int, concentration: float) -> float:
    """log Z of the density exp(concentration * cosine) / Z on the unit sphere in `dim` dimensions.

    Raises:
        ValueError: If there is no such density.

    Source: Mardia and Jupp, Directional Statistics, section 9.3.2.
    """
    if dim < 2:
        raise ValueError(f"`dim` must be at least 2 for a sphere, got {dim}.")
    if concentration <= 0:
        raise ValueError(f"`concentration` must be positive, got {concentration}.")
    order = dim / 2 - 1
    return -order * math.log(concentration) + dim / 2 * math.log(2 * math.pi) + log_bessel(order, concentration)
