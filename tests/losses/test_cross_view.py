import pytest
import torch
from torch import Tensor

from ssl_distill.losses.cross_view import cross_view_entropy
from ssl_distill.optim.schedules import EpochRamp, Position
from ssl_distill.targets.center import Center
from ssl_distill.targets.sinkhorn import SinkhornKnopp


def naive(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Equation 3, term by term."""
    terms = [
        -(target * (view / temperature).log_softmax(-1)).sum(-1).mean()
        for t, target in enumerate(targets)
        for v, view in enumerate(logits)
        if t != v
    ]
    return torch.stack(terms).mean()


def centered(golden_case, dtype=torch.float64):
    center = Center(golden_case.params["out_dim"], golden_case.params["center_momentum"]).to(dtype)
    center.value.copy_(golden_case.tensors["center_in"])
    return center


def test_golden(golden):
    for name in golden.cases("dino/loss_*crop*"):
        case = golden(name)
        center = centered(case)
        teacher_logits = case.tensors["teacher_logits"].unflatten(0, (2, -1))
        student_logits = case.tensors["student_logits"].unflatten(0, (case.params["ncrops"], -1)).requires_grad_()
        ramp = EpochRamp(*(case.params[key] for key in
                           ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs")))  # fmt: skip
        temperature = ramp.at(Position(case.params["epoch"], case.params["nepochs"], 1))
        assert temperature == pytest.approx(case.params["teacher_temp_used"], rel=1e-12)

        targets = center(teacher_logits, temperature)
        loss = cross_view_entropy(targets, student_logits, case.params["student_temp"])
        loss.backward()
        center.observe(teacher_logits)
        center.update()

        expect = {"rtol": 1e-6, "atol": 1e-9}
        torch.testing.assert_close(targets.flatten(0, 1), case.tensors["teacher_probs"], **expect)
        torch.testing.assert_close(loss, case.tensors["loss"], **expect)
        torch.testing.assert_close(student_logits.grad.flatten(0, 1), case.tensors["grad_student_logits"], **expect)
        torch.testing.assert_close(center.value, case.tensors["center_out"], **expect)


def test_golden_sequence(golden):
    case = golden("dino/loss_sequence")
    params = case.params
    center = Center(params["out_dim"], params["center_momentum"]).double()
    ramp = EpochRamp(params["warmup_teacher_temp"], params["teacher_temp"], params["warmup_teacher_temp_epochs"])
    for i, epoch in enumerate(params["epochs"]):
        teacher_logits = case.tensors[f"teacher_logits_{i}"].unflatten(0, (2, -1))
        student_logits = case.tensors[f"student_logits_{i}"].unflatten(0, (params["ncrops"], -1))
        temperature = ramp.at(Position(epoch, params["nepochs"], 1))
        loss = cross_view_entropy(center(teacher_logits, temperature), student_logits, params["student_temp"])
        center.observe(teacher_logits)
        center.update()
        assert temperature == pytest.approx(case.tensors["teacher_temps"][i].item(), rel=1e-12)
        torch.testing.assert_close(loss, case.tensors["losses"][i], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(center.value[0], case.tensors["centers_after"][i], rtol=1e-6, atol=1e-9)


def test_golden_sinkhorn(golden):
    case = golden("dino/v2_sinkhorn_loss")
    teacher_logits = case.tensors["teacher_logits"].unflatten(0, (2, -1))
    sinkhorn = SinkhornKnopp(case.params["out_dim"], case.params["n_iterations"])
    student_logits = torch.cat([case.tensors["student_global_logits"], case.tensors["student_local_logits"]])
    student_logits = student_logits.unflatten(0, (2 + case.params["n_local"], -1)).requires_grad_()

    targets = sinkhorn(teacher_logits, case.params["teacher_temp"])
    loss = cross_view_entropy(targets, student_logits, case.params["student_temp"])
    loss.backward()

    expected_targets = case.tensors["teacher_probs_sinkhorn"].to(targets.dtype)
    torch.testing.assert_close(targets.flatten(0, 1), expected_targets, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, case.tensors["loss_total"], rtol=1e-5, atol=1e-5)
    expected = torch.cat([case.tensors["grad_student_global"], case.tensors["grad_student_local"]])
    torch.testing.assert_close(student_logits.grad.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("teacher_views", "views"), [(1, 2), (2, 2), (2, 5), (3, 4)])
def test_gradient(teacher_views, views):
    targets = torch.randn(teacher_views, 4, 7, dtype=torch.float64).softmax(-1)
    logits = torch.randn(views, 4, 7, dtype=torch.float64, requires_grad=True)
    loss = cross_view_entropy(targets, logits, 0.3)
    torch.testing.assert_close(loss, naive(targets, logits, 0.3))
    expected = torch.autograd.grad(3 * naive(targets, logits, 0.3), logits)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, logits), expected)


def test_a_view_without_a_partner_gets_a_gradient_of_zero():
    """Also where memory was not zero before, and where no gradient is asked for."""
    targets, logits = torch.rand(1, 4, 7).softmax(-1), torch.randn(2, 4, 7, requires_grad=True)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with nan
    try:
        loss = cross_view_entropy(targets, logits)
        (gradient,) = torch.autograd.grad(loss, logits)
    finally:
        torch.use_deterministic_algorithms(False)
    assert gradient[0].eq(0).all()
    assert gradient[1].abs().max() > 0
    torch.testing.assert_close(cross_view_entropy(targets, logits.detach()), loss.detach())
    torch.testing.assert_close(loss, naive(targets, logits, 1.0))


def test_half_precision_is_summed_in_float32():
    targets, logits = torch.randn(2, 16, 300).softmax(-1), torch.randn(4, 16, 300).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_view_entropy(targets, logits, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, naive(targets, logits.float(), 0.1))
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16


def test_errors():
    with pytest.raises(ValueError, match="one to compare with, got 1 views"):
        cross_view_entropy(torch.ones(1, 2, 3) / 3, torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="teacher's 3 views"):
        cross_view_entropy(torch.ones(3, 2, 3) / 3, torch.zeros(2, 2, 3))
