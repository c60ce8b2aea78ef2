import math

import pytest
import torch

from ssl_distill.losses.von_mises_fisher import log_bessel, log_normalizer


def test_golden(golden):
    case = golden("entropy_reconstruction/vmf_log_normalizer")
    for i, (dim, kappa) in enumerate(zip(case.tensors["dim"].tolist(), case.tensors["kappa"].tolist(), strict=True)):
        assert log_bessel(dim / 2 - 1, kappa) == pytest.approx(case.tensors["log_bessel_exact"][i].item(), rel=1e-9)
        expected = case.tensors["log_normalizer_exact"][i].item()
        assert log_normalizer(dim, kappa) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_density_sums_to_one():
    """On the circle, and on the sphere where the constant is elementary."""
    angle = torch.linspace(0, 2 * math.pi, 10_001, dtype=torch.float64)
    total = torch.trapezoid((3 * angle.cos()).exp(), angle)
    assert log_normalizer(2, 3.0) == pytest.approx(total.log().item(), rel=1e-9)
    assert log_normalizer(3, 5.0) == pytest.approx(math.log(4 * math.pi * math.sinh(5) / 5), rel=1e-12)


def test_errors():
    for call, message in [
        (lambda: log_normalizer(1, 1.0), "`dim` must be at least 2 for a sphere, got 1"),
        (lambda: log_normalizer(3, 0.0), "`concentration` must be positive, got 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
