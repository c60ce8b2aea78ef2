import math

import numpy as np
import pytest
import torch

from ssl_distill.evaluate.features import Features
from ssl_distill.evaluate.quality import (
    Quality,
    alpha_req,
    clid,
    cluster_learnability,
    intrinsic_dimension,
    k_means,
    rankme,
    stable_rank,
    uniformity,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(singular_values, num=200):
    """Centred features with these singular values."""
    basis = torch.linalg.qr(normal(num, len(singular_values) + 1) + 1)[0]
    basis = torch.linalg.qr(torch.cat([torch.ones(num, 1, dtype=basis.dtype), basis[:, 1:]], dim=1))[0][:, 1:]
    rotation = torch.linalg.qr(normal(len(singular_values), len(singular_values)))[0]
    return basis * torch.as_tensor(singular_values) @ rotation


def test_rankme_counts_directions():
    assert rankme(with_spectrum([2.0] * 7)) == pytest.approx(7, rel=1e-4)
    assert rankme(with_spectrum([2.0] * 4 + [0.0] * 4)) == pytest.approx(4, rel=1e-3)
    assert rankme(with_spectrum([3.0, 1.0])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), rel=1e-4
    )
    assert rankme(torch.ones(50, 8)) == pytest.approx(1, abs=1e-4)


def test_rankme_of_fewer_images_than_dimensions():
    assert rankme(with_spectrum([1.0] * 5, num=20).T) == pytest.approx(5, rel=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_is_the_decay_of_the_covariance(alpha):
    singular_values = torch.arange(1, 31, dtype=torch.float64) ** (-alpha / 2)
    assert alpha_req(with_spectrum(singular_values) + 5) == pytest.approx(alpha, rel=1e-6)


def test_alpha_is_the_weighted_fit_of_the_authors_ranks():
    """Of a spectrum that is no power law: numpy's weighted line through ranks 6 to 100."""
    eigenvalues = torch.linspace(5, 1, 130, dtype=torch.float64).exp() + normal(130).abs()
    eigenvalues = eigenvalues.sort(descending=True).values
    rank = np.arange(6, 101)
    # polyfit squares its weights.
    slope, _ = np.polyfit(np.log(rank), eigenvalues[5:100].log().numpy(), 1, w=rank**-0.5)
    assert alpha_req(with_spectrum(eigenvalues.sqrt())) == pytest.approx(-slope, rel=1e-6)


def test_alpha_of_few_directions():
    assert alpha_req(with_spectrum([3.0] * 6)) == float("inf")
    assert alpha_req(with_spectrum([3.0] * 6), ranks=(1, 4)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match=r"`ranks` must be a first and a later last rank, from 1 on, got \(3, 3\)"):
        alpha_req(with_spectrum([3.0] * 6), ranks=(3, 3))


def test_stable_rank():
    assert stable_rank(with_spectrum([2.0, 1.0, 1.0]) - 7) == pytest.approx(6 / 4, rel=1e-6)


def test_uniformity_of_known_pairs():
    assert uniformity(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(-8)  # antipodes: squared distance 4
    expected = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert uniformity(torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]])) == pytest.approx(expected)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_intrinsic_dimension_of_a_subspace(dimension):
    uniform = torch.rand(2000, dimension, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert intrinsic_dimension(uniform @ normal(dimension, 30)) == pytest.approx(dimension, rel=0.15)


def test_twins_do_not_change_the_intrinsic_dimension():
    rows = normal(500, 3)
    with_twins = torch.cat([rows, rows[:100]])
    assert intrinsic_dimension(with_twins) == pytest.approx(intrinsic_dimension(rows))


def blobs(num_blobs, spread):
    return normal(num_blobs, 16, seed=5).repeat(30, 1) * 10 + spread * normal(30 * num_blobs, 16, seed=6)


def test_k_means_finds_blobs():
    found = k_means(blobs(2, 0.1), 2).view(30, 2)
    assert (found == found[0]).all()
    assert found[0, 0] != found[0, 1]


def test_cluster_learnability_by_its_definition():
    rows = blobs(4, 8.0)
    found, right = k_means(rows, 6), 0
    for i in range(1, len(rows)):
        nearest = (rows[:i] - rows[i]).square().sum(1).argmin()
        right += int(found[nearest] == found[i])
    assert cluster_learnability(rows, 6) == pytest.approx(right / (len(rows) - 1))
    assert 0.2 < cluster_learnability(normal(300, 16), 20) < cluster_learnability(blobs(4, 0.1), 4)


def test_clid_adds_standardised_parts():
    learnability, dimension = torch.tensor([0.2, 0.4, 0.6]), torch.tensor([10.0, 30.0, 20.0])
    unit = math.sqrt(3 / 2)
    torch.testing.assert_close(clid(learnability, dimension), torch.tensor([-2 * unit, unit, unit]))


def features(rows):
    return Features(rows.float(), torch.full((len(rows),), -1), torch.arange(len(rows)))


def test_quality_needs_no_labels_and_tells_collapse():
    bank, collapsed = features(normal(300, 12)), features(torch.ones(300, 12) + 1e-9)
    with torch.inference_mode():
        learned, broken = Quality()(bank, bank), Quality()(collapsed, collapsed)
    assert set(learned) == set(broken)
    assert broken["rankme"] < 1.1 < 10 < learned["rankme"]
    assert broken["uniformity"] == pytest.approx(0, abs=1e-6)
    assert learned["uniformity"] < -2
    assert broken["stable_rank"] == broken["clid_dimension"] == 0
    assert broken["alpha_req"] == float("inf")


def test_subsets_are_the_same_every_time():
    bank = features(normal(300, 12))
    quality = Quality(max_spectrum=50, max_pairwise=40, num_clusters=5)
    first = quality(bank, bank)
    quality.reset()
    torch.manual_seed(9)
    assert quality(bank, bank) == first
    assert first["rankme"] != Quality()(bank, bank)["rankme"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_spectrum": 2}, "`max_spectrum` must be at least 3, got 2"),
        ({"max_pairwise": 0}, "`max_pairwise` must be at least 3, got 0"),
        ({"num_clusters": 1}, "`num_clusters` must be at least 2, got 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Quality(**arguments)


def test_bank_of_two_images():
    two = features(torch.eye(2))
    with pytest.raises(ValueError, match="`Quality` needs a bank of at least 3 images, got 2"):
        Quality()(two, two)
