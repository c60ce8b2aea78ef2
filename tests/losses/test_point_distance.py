import pytest
import torch
import torch.nn.functional as F

from ssl_distill.losses.point_distance import (
    cosine_point_distance,
    point_distance,
    shuffled_point_distance,
    squared_point_distance,
    unit,
)


def pairs_of(case, points):
    """Student and teacher rows of all clouds, read at the recorded pairs."""
    t = case.tensors
    students, teachers = [], []
    for i in range(case.params["batch"]):
        image, row, column = t[f"pairing_images_{i}"].T
        students.append(points[i, :, t[f"pairing_points_{i}"]].T)
        teachers.append(t["image_feature_map"][image + i, :, row, column])
    return torch.cat(students), torch.cat(teachers)


@pytest.mark.parametrize("name", ["scalr/distill_loss", "scalr/distill_loss_degenerate"])
def test_golden(golden, name):
    case = golden(name)
    points = case.tensors["point_features"].clone().requires_grad_()
    loss = point_distance(*pairs_of(case, points))
    loss.backward()
    torch.testing.assert_close(loss, case.tensors["loss"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(points.grad, case.tensors["grad_point_features"], rtol=1e-6, atol=1e-6)


def test_gradient():
    """Against finite differences and against the closed form."""
    torch.manual_seed(0)
    student = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, 5, dtype=torch.float64)
    for loss in (point_distance, squared_point_distance, cosine_point_distance):
        assert torch.autograd.gradcheck(loss, (student, teacher))
    point_distance(student, teacher).backward()
    k, q = student.detach(), teacher
    k_norm = k.norm(dim=1, keepdim=True)
    k_unit, q_unit = k / k_norm, q / q.norm(dim=1, keepdim=True)
    distance = (k_unit - q_unit).norm(dim=1, keepdim=True)
    expected = -(q_unit - (k_unit * q_unit).sum(1, keepdim=True) * k_unit) / (7 * distance * k_norm)
    torch.testing.assert_close(student.grad, expected)


def test_known_values():
    student, teacher = torch.eye(3, 4), torch.eye(3, 4).roll(1, 1)
    assert point_distance(student, teacher).item() == pytest.approx(2**0.5)
    assert squared_point_distance(student, teacher).item() == pytest.approx(2.0)
    assert cosine_point_distance(student, teacher).item() == pytest.approx(1.0)
    assert point_distance(student, -3 * student).item() == pytest.approx(2.0)
    rows, others = torch.randn(6, 4), torch.randn(6, 4)
    torch.testing.assert_close(cosine_point_distance(rows, others), 1 - F.cosine_similarity(rows, others).mean())


def test_control_compares_other_pairs():
    torch.manual_seed(0)
    rows = torch.eye(50)
    assert shuffled_point_distance(rows, rows) > 1.2  # the square root of 2, but for the rows that stay in place
    assert shuffled_point_distance(torch.ones(9, 4), torch.ones(9, 4)) == 0


def test_gradient_is_finite_everywhere():
    """Equal vectors, vectors of length 0 and no vectors at all."""
    teacher = torch.randn(4, 3)
    student = teacher.clone()
    student[1] = 0
    student[2] = 1e-20
    student.requires_grad_()
    point_distance(student, teacher).backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 1
    nobody = torch.empty(0, 3, requires_grad=True)
    loss = point_distance(nobody, torch.empty(0, 3))
    loss.backward()
    assert loss == 0


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    student, teacher = torch.randn(50, 16), torch.randn(50, 16)
    loss = point_distance(student.half(), teacher.half())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, point_distance(student, teacher), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(unit(student.half()).norm(dim=1), torch.ones(50), rtol=1e-6, atol=0)
    assert point_distance(student.double(), teacher).dtype == torch.float64


def test_ranks():
    """Two ranks with different numbers of pairs average to the mean over all pairs."""
    torch.manual_seed(0)
    student, teacher = torch.randn(10, 4), torch.randn(10, 4)
    parts = [point_distance(student[rows], teacher[rows], 5) for rows in (slice(0, 3), slice(3, 10))]
    torch.testing.assert_close(sum(parts) / 2, point_distance(student, teacher))
