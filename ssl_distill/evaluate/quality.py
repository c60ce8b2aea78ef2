"""What can be said about features without labels.

Spectra and distances are computed in float64 on the CPU: they need the digits, and not every device has float64.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ssl_distill.evaluate.evaluator import Evaluator
from ssl_distill.evaluate.features import Features


def rankme(features: Float[Tensor, "N D"]) -> float:
    """Effective rank: exponential of the entropy of the singular values, between 1 and D. Higher is better.

    Source: RankMe (arXiv 2210.02885), eq. 1.
    """
    singular_values = _spectrum(_exact(features)).sqrt()
    total = singular_values.sum()
    share = singular_values / total.clamp(min=torch.finfo(total.dtype).tiny) + 1e-7
    return float(torch.special.entr(share).sum().exp())


def alpha_req(features: Float[Tensor, "N D"], ranks: tuple[int, int] = (6, 100)) -> float:
    """Decay of the covariance spectrum: alpha in eigenvalue_n ~ n^-alpha, a line through the logarithms.

    The authors find features that generalise best where alpha is near 1; larger is a spectrum of few directions,
    smaller one that noise fills.

    Args:
        features: One row per image.
        ranks: First and last place of an eigenvalue in the fit, counted from 1; those that do not exist are left out.

    Returns:
        Alpha; infinite if fewer than two directions at these ranks vary beyond rounding.

    Raises:
        ValueError: If `ranks` are no range.

    Source: alpha-ReQ (Agrawal et al., NeurIPS 2022), by the authors' code: weights 1/n, ranks 6 to 100.
    """
    first, last = ranks
    if not 1 <= first < last:
        raise ValueError(f"`ranks` must be a first and a later last rank, from 1 on, got {ranks}.")
    eigenvalues = _spectrum(_centered(features))
    eigenvalues = eigenvalues[eigenvalues > eigenvalues[0] * 1e-10][first - 1 : last]
    if len(eigenvalues) < 2:
        return float("inf")
    rank = torch.arange(first, first + len(eigenvalues), dtype=eigenvalues.dtype)
    weight = 1 / rank
    place = rank.log() - (weight @ rank.log()) / weight.sum()
    return -float((weight * place) @ eigenvalues.log() / (weight * place @ place))


def stable_rank(features: Float[Tensor, "N D"]) -> float:
    """Squared Frobenius norm over squared spectral norm of the centred features, between 1 and D; 0 if constant.

    Source: Rudelson and Vershynin (J. ACM 2007), the numerical rank.
    """
    eigenvalues = _spectrum(_centered(features))
    return float(eigenvalues.sum() / eigenvalues[0]) if eigenvalues[0] > 0 else 0.0


def uniformity(features: Float[Tensor, "N D"]) -> float:
    """Logarithm of the mean Gaussian potential, t = 2, over pairs of unit features. 0 is collapsed, lower is better.

    Source: Wang and Isola (arXiv 2005.10242), section 4.1.2.
    """
    return float(torch.pdist(F.normalize(_exact(features), dim=1)).square().mul(-2).exp().mean().log())


def intrinsic_dimension(features: Float[Tensor, "N D"]) -> float:
    """TwoNN estimate: one over the mean logarithm of second to first neighbour's distance; 0 if all features are equal.

    The expressiveness of CLID. Of images with equal features one counts.

    Source: CLID (arXiv 2206.01251), after Facco et al. (arXiv 1803.06992): the ratios follow a Pareto law with the
    dimension as its exponent, here by maximum likelihood.
    """
    exact = _exact(features)
    distance = torch.cdist(exact, exact)
    twin = (distance <= 1e-6 * exact.norm(dim=1).mean()).tril(-1).any(dim=1)  # float32 features cannot tell them apart
    distance = distance[~twin][:, ~twin]
    if len(distance) < 3:
        return 0.0
    nearest = distance.fill_diagonal_(float("inf")).topk(2, largest=False).values  # (N, 2)
    return float(len(nearest) / (nearest[:, 1] / nearest[:, 0]).log().sum())


def cluster_learnability(features: Float[Tensor, "N D"], num_clusters: int = 50) -> float:
    """How soon a nearest-neighbour classifier learns the k-means clusters: accuracy on each row from those before it.

    Source: CLID (arXiv 2206.01251): the learning speed of a k-NN classifier of k-means clusters, here with k = 1.
    """
    exact = _exact(features)
    clusters = k_means(exact, min(num_clusters, len(exact)))
    later = torch.ones(len(exact), len(exact), dtype=torch.bool).triu()
    teacher = torch.cdist(exact, exact).masked_fill_(later, float("inf")).argmin(dim=1)
    return float((clusters[teacher] == clusters)[1:].double().mean())


def clid(learnability: Float[Tensor, "M"], dimension: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
    """CLID of M encoders or checkpoints: both parts, standardised over the M, added up. Higher is better.

    Only defined relative to others, which is why `Quality` tells the two parts.

    Source: CLID (arXiv 2206.01251).
    """
    parts = torch.stack([learnability, dimension])
    std, mean = torch.std_mean(parts, dim=1, keepdim=True, correction=0)
    return ((parts - mean) / std.clamp(min=1e-12)).sum(dim=0)


def k_means(points: Float[Tensor, "N D"], num_clusters: int, iterations: int = 20) -> Int[Tensor, "N"]:
    """Cluster of every point after Lloyd's iterations from random points, drawn by a fixed seed."""
    start = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:num_clusters]
    centers = points[start.to(points.device)].clone()
    for _ in range(iterations):
        clusters = torch.cdist(points, centers).argmin(dim=1)
        sizes = clusters.bincount(minlength=num_clusters)[:, None]
        sums = torch.zeros_like(centers).index_add_(0, clusters, points)
        centers = torch.where(sizes > 0, sums / sizes.clamp(min=1), centers)
    return torch.cdist(points, centers).argmin(dim=1)


class Quality(Evaluator):
    """Label-free numbers of the bank: `rankme`, `alpha_req`, `stable_rank`, `uniformity`, and the two parts of CLID.

    Args:
        max_spectrum: Images that spectra are computed from, drawn by a fixed seed; RankMe's authors use 25,600.
        max_pairwise: Images that distances are computed from.
        num_clusters: Of cluster learnability.
    """

    needs_labels = False

    def __init__(self, max_spectrum: int = 25600, max_pairwise: int = 2000, num_clusters: int = 50) -> None:
        super().__init__()
        for name, value in {"max_spectrum": max_spectrum, "max_pairwise": max_pairwise}.items():
            if value < 3:
                raise ValueError(f"`{name}` must be at least 3, got {value}.")
        if num_clusters < 2:
            raise ValueError(f"`num_clusters` must be at least 2, got {num_clusters}.")
        self.max_spectrum = max_spectrum
        self.max_pairwise = max_pairwise
        self.num_clusters = num_clusters

    @property
    def protocol(self) -> dict[str, Any]:
        """How many images and clusters."""
        return {
            "max_spectrum": self.max_spectrum,
            "max_pairwise": self.max_pairwise,
            "num_clusters": self.num_clusters,
        }

    def scores(self, bank: Features, query: Features) -> dict[str, float]:
        """Numbers of the bank; the queries are not looked at."""
        if len(bank.features) < 3:
            raise ValueError(f"`Quality` needs a bank of at least 3 images, got {len(bank.features)}.")
        order = torch.randperm(len(bank.features), generator=torch.Generator().manual_seed(0))
        order = order.to(bank.features.device)
        many = bank.features[order[: self.max_spectrum]]
        few = bank.features[order[: self.max_pairwise]]
        return {
            "rankme": rankme(many),
            "alpha_req": alpha_req(many),
            "stable_rank": stable_rank(many),
            "uniformity": uniformity(few),
            "clid_dimension": intrinsic_dimension(few),
            "clid_learnability": cluster_learnability(few, self.num_clusters),
        }


def _exact(features: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    return features.to("cpu", torch.float64)


def _centered(features: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    exact = _exact(features)
    return exact - exact.mean(dim=0)


def _spectrum(matrix: Float[Tensor, "N D"]) -> Float[Tensor, "r"]:
    """Squared singular values, largest first."""
    eigenvalues = torch.linalg.eigvalsh(matrix.T @ matrix).flip(0).clamp(min=0)
    return eigenvalues[: min(matrix.shape)]
