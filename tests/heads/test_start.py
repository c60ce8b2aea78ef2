import math

import pytest
import torch
from torch import nn

from ssl_distill.heads.start import StartNear, mix_parameters, start_equal


class Stored(nn.Module):
    """Parameters of a golden file."""

    def __init__(self, tensors):
        super().__init__()
        self.values = nn.ParameterDict({name: value.clone() for name, value in tensors.items()})


def check(student, case, prefix):
    for name, value in case.under(prefix).items():
        torch.testing.assert_close(student.values[name].detach(), value, rtol=1e-6, atol=1e-8)


def test_golden(golden):
    """Weighted sums, with and without the scale that keeps the variance; a neighbourhood is such a sum too."""
    case = golden("random_teacher/init_interpolation")
    prefixes = {name.split(".bn_b")[0] for name in case.tensors if name.startswith(("interp", "neigh"))}
    prefixes = {name for name in prefixes if f"{name}.bn_b" in case.tensors}
    assert len(prefixes) >= 4
    for prefix in prefixes:
        kind, share, keeps_variance = prefix.split("_")
        share = float(share[1:])
        shares = (share, 1 - share) if kind == "interp" else (share, 1.0)
        scale = math.hypot(*shares) if keeps_variance == "vp1" else 1.0
        student, teacher = Stored(case.under("fresh.")), Stored(case.under("teacher."))
        mix_parameters(student, teacher, *(each / scale for each in shares))
        check(student, case, f"{prefix}.")
        if kind == "interp" and keeps_variance == "vp1":
            student = Stored(case.under("fresh."))
            StartNear(share)(student, teacher)
            check(student, case, f"{prefix}.")


def networks():
    return tuple(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))


def test_ends():
    student, teacher = networks()
    drawn = student[0].weight.detach().clone()
    StartNear(1.0)(student, teacher)
    assert torch.equal(student[0].weight, drawn)
    StartNear(0.0)(student, teacher)
    assert torch.equal(student[0].weight, teacher[0].weight)
    assert not torch.equal(student[0].weight, drawn)


def test_buffers():
    """A copy has the student's; a neighbour keeps its own."""
    student, teacher = networks()
    student[1].running_mean.fill_(3)
    StartNear(0.5)(student, teacher)
    assert (student[1].running_mean == 3).all()
    assert (teacher[1].running_mean == 0).all()
    start_equal(student, teacher)
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), teacher.state_dict().values(), strict=True)
    )


def test_errors():
    for locality in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"`locality` must lie in \[0, 1\], got {locality}"):
            StartNear(locality)
