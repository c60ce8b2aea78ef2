import pytest
import torch
from torch import multiprocessing

from ssl_distill.losses.cross_view import cross_view_entropy
from ssl_distill.optim.schedules import EpochRamp, Position
from ssl_distill.targets.center import Center
from ssl_distill.targets.health import output_health
from ssl_distill.targets.sinkhorn import SinkhornKnopp


def test_center_state_is_saved():
    center = Center(3)
    assert set(center.state_dict()) == {"value"}
    center.observe(torch.ones(2, 4, 3))
    center.update()
    restored = Center(3)
    restored.load_state_dict(center.state_dict())
    torch.testing.assert_close(restored.value, torch.full((1, 3), 0.1))


def test_center_collects_batches_until_its_update():
    logits = torch.randn(2, 6, 3)
    at_once, in_parts, idle = Center(3), Center(3), Center(3)
    at_once.observe(logits)
    for part in logits.split(2, dim=1):
        in_parts.observe(part)
    idle.observe(logits[:, :0])
    for center in (at_once, in_parts, idle):
        center.update()
    torch.testing.assert_close(at_once.value[0], 0.1 * logits.mean((0, 1)))
    torch.testing.assert_close(in_parts.value, at_once.value)
    assert idle.value.abs().max() == 0


def test_rows_may_weigh_less_than_one():
    center = Center(2, momentum=0.5)
    center.observe_sum(torch.tensor([1.0, 2.0]) * 0.25, torch.tensor(0.25))
    center.update()
    assert center.value.tolist() == [[0.5, 1.0]]


def test_no_gradient_flows_into_targets_and_memories():
    logits = torch.randn(4, 3, requires_grad=True)
    center = Center(3)
    center.observe(logits)
    center.observe_sum(logits.sum(0), torch.tensor(4.0))
    assert not center.observed.requires_grad
    center.update()
    for targets in (center, SinkhornKnopp(3)):
        assert not targets(logits, 0.1).requires_grad


def test_golden_default_iterations(golden):
    logits = torch.randn(2, 4, 6)
    iterations = golden("dino/v2_sinkhorn_loss").params["n_iterations"]
    torch.testing.assert_close(SinkhornKnopp(6)(logits, 0.5), SinkhornKnopp(6, iterations)(logits, 0.5))


def test_sinkhorn_uses_all_prototypes_equally():
    targets = SinkhornKnopp(5, num_iterations=200)(torch.randn(2, 10, 5), 0.5)
    torch.testing.assert_close(targets.sum(-1), torch.ones(2, 10))
    torch.testing.assert_close(targets.sum((0, 1)), torch.full((5,), 4.0), rtol=1e-3, atol=1e-3)


def test_sinkhorn_does_not_overflow():
    logits = torch.randn(2, 4, 6)
    sinkhorn = SinkhornKnopp(6)
    torch.testing.assert_close(sinkhorn(logits + 1e4, 0.5), sinkhorn(logits, 0.5), rtol=1e-2, atol=1e-3)


def test_errors():
    with pytest.raises(ValueError, match=r"`momentum` must lie in \[0, 1\], got 1.5"):
        Center(4, momentum=1.5)
    with pytest.raises(ValueError, match="`num_iterations` must be at least 1, got 0"):
        SinkhornKnopp(4, num_iterations=0)


def test_health_tells_collapse_from_learning():
    features, loss = torch.randn(4, 8, 16), torch.tensor(2.0)
    spread = torch.eye(8).expand(2, 8, 8)
    one_prototype = torch.eye(8)[:1].expand(2, 8, 8)
    uniform = torch.full((2, 8, 8), 1 / 8)
    healthy = output_health(spread, loss, features)
    assert healthy["mean_output_entropy"] == pytest.approx(torch.tensor(8.0).log().item())
    assert healthy["teacher_entropy"] == 0
    assert healthy["prototypes_used"] == 1
    assert healthy["max_probability"] == 1
    assert output_health(one_prototype, loss, features)["max_probability"] == 1
    assert output_health(uniform, loss, features)["max_probability"] == 1 / 8
    assert output_health(one_prototype, loss, features)["prototypes_used"] == 1 / 8
    assert healthy["feature_std"] <= 1
    # A half of 16 dimensions is used, each by one of 8 images.
    one_hot = output_health(spread, loss, torch.eye(8, 16).expand(1, 8, 16))
    assert one_hot["feature_std"] == pytest.approx(7**0.5 / 4)
    assert output_health(spread, loss, features, torch.full((1, 4), 2.0))["center_norm"] == 4
    assert output_health(one_prototype, loss, features)["mean_output_entropy"] == 0
    assert output_health(uniform, loss, features)["kl"] == pytest.approx(2 - torch.tensor(8.0).log().item(), abs=1e-5)
    constant = output_health(spread, loss, torch.ones_like(features))
    assert constant["feature_std"] < 1e-6 < 0.5 < healthy["feature_std"]


def on_rank(rank: int, world: int, store: str, case, logits):
    """One rank's part of the two-rank tests; failures surface as exceptions of `spawn`."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    params, tensors = case.params, case.tensors
    center = Center(params["out_dim"], params["center_momentum"]).double()
    ramp = EpochRamp(params["warmup_teacher_temp"], params["teacher_temp"], params["warmup_teacher_temp_epochs"])
    for i, epoch in enumerate(params["epochs"]):
        teacher_logits = tensors[f"rank{rank}.teacher_logits_{i}"].unflatten(0, (2, -1))
        student_logits = tensors[f"rank{rank}.student_logits_{i}"].unflatten(0, (params["ncrops"], -1)).requires_grad_()
        targets = center(teacher_logits, ramp.at(Position(epoch, params["nepochs"], 1)))
        loss = cross_view_entropy(targets, student_logits, params["student_temp"])
        loss.backward()
        center.observe(teacher_logits)
        center.update()
        expect = {"rtol": 1e-6, "atol": 1e-9}
        torch.testing.assert_close(loss, tensors[f"rank{rank}.loss_{i}"], **expect)
        gradient = student_logits.grad.flatten(0, 1)
        torch.testing.assert_close(gradient, tensors[f"rank{rank}.grad_student_logits_{i}"], **expect)
        torch.testing.assert_close(center.value, tensors[f"center_after_{i}"], **expect)
    # Sinkhorn over two ranks with half the rows each gives the rows of one rank with all of them.
    half = SinkhornKnopp(logits.shape[-1])(logits.chunk(world, dim=1)[rank], 0.1)
    gathered = [torch.empty_like(half) for _ in range(world)]
    torch.distributed.all_gather(gathered, half.contiguous())
    torch.distributed.destroy_process_group()
    torch.testing.assert_close(torch.cat(gathered, 1), SinkhornKnopp(logits.shape[-1])(logits, 0.1))


@pytest.mark.ddp
def test_golden_ranks(golden, tmp_path):
    case = golden("dino/loss_two_ranks")
    world = case.params["world_size"]
    logits = torch.randn(2, 4 * world, 6, dtype=torch.float64)
    multiprocessing.spawn(on_rank, (world, str(tmp_path / "store"), case, logits), nprocs=world)
