import socket

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from ssl_distill.losses.consolidated import paired_entropy, point_entropy
from ssl_distill.losses.cross_view import cross_view_entropy
from ssl_distill.targets.center import Center, over_ranks, over_samples
from ssl_distill.targets.consolidated import (
    Consolidation,
    PatchVectors,
    blend_probabilities,
    class_where_empty,
    shrink_where_empty,
)

EXPECT = {"rtol": 1e-6, "atol": 1e-9}


class Levels:
    """Tensors of a golden loss case in our shapes; logits are their own vectors, the prototypes the identity."""

    def __init__(self, case):
        params, self.tensors = case.params, case.tensors
        self.batch, self.num_local = params["batch"], params["num_local_crops"]
        self.class_logits = self.by_view("teacher_cls")
        if params["include_patch"]:
            self.points = PatchVectors(self.by_view("teacher_patch_global"), self.by_view("teacher_weight_global"))
            local, weight = self.tensors["teacher_patch_local"], self.tensors["teacher_weight_local"]
            self.local_points = PatchVectors(*(each.unflatten(1, (2, self.batch)) for each in (local, weight)))
        else:
            self.points = PatchVectors(torch.zeros(2, self.batch, 0, params["out_dim"]), torch.zeros(2, self.batch, 0))
            shape = (self.num_local, 2, self.batch, 0)
            self.local_points = PatchVectors(torch.zeros(*shape, params["out_dim"]), torch.zeros(shape))
        self.points, self.local_points = (
            PatchVectors(*(each.double() for each in points)) for points in (self.points, self.local_points)
        )

    def by_view(self, name):
        return self.tensors[name].unflatten(0, (-1, self.batch))

    def student(self, name):
        """Logits of global, then local crops."""
        return torch.cat([self.by_view(f"student_{name}_global"), self.by_view(f"student_{name}_local")])


@pytest.mark.parametrize("name", ["loss_full", "loss_no_plus", "loss_cls_only"])
def test_golden(golden, name):
    case = golden(f"udi/{name}")
    params, tensors, levels = case.params, case.tensors, Levels(case)
    names = ["cls", *(["plus"] if params["num_class_tokens"] == 2 else []), *(["patch"] * params["include_patch"])]
    consolidation = Consolidation(
        params["out_dim"], params["center_momentum"], params["alpha"], empty_share=shrink_where_empty
    ).double()
    centers = {
        "cls": consolidation.class_center,
        "plus": consolidation.plus_center,
        "patch": consolidation.patch_center,
    }
    for level, value in zip(names, tensors["center_in"], strict=True):
        centers[level].value.copy_(value)
    targets = consolidation(
        levels.class_logits, levels.points, levels.local_points, nn.Identity(), params["teacher_temp"]
    )
    temperature = params["student_temp"]
    losses, students = {}, {}
    for level in names[:2] if "plus" in names else names[:1]:
        students[level] = levels.student(level).clone().requires_grad_()
    losses["cls"] = cross_view_entropy(targets.class_targets, students["cls"], temperature)
    torch.testing.assert_close(targets.class_targets.flip(0).flatten(0, 1), tensors["target_cls_global"], **EXPECT)
    if "plus" in names:
        losses["plus"] = paired_entropy(targets.plus_global, targets.plus_local, students["plus"], temperature)
        torch.testing.assert_close(targets.plus_global.flatten(0, 1), tensors["target_plus_global"], **EXPECT)
        expected = tensors["target_plus_local"].sum(1)  # over both global crops
        torch.testing.assert_close(targets.plus_local.flatten(0, 1), expected, **EXPECT)
    if "patch" in names:
        students["patch"] = levels.by_view("student_patch_global").clone().requires_grad_()
        there = levels.by_view("student_valid_global") > 0
        losses["patch"] = point_entropy(targets.patch_targets[there], students["patch"][there], there, temperature)
        torch.testing.assert_close(targets.patch_targets.flatten(0, 1), tensors["target_patch_global"], **EXPECT)
        torch.testing.assert_close(losses["patch"].detach(), tensors["loss_patch_global"], **EXPECT)
    for level in set(names) - {"patch"}:
        num_local = params["num_local_crops"]
        mean = 2 * tensors[f"loss_{level}_global"] + 2 * num_local * tensors[f"loss_{level}_local"]
        torch.testing.assert_close(losses[level].detach(), mean / (2 + 2 * num_local), **EXPECT)

    weights = dict(zip(names, params["level_weights"], strict=True))
    total = sum(weights[level] * losses[level] for level in names)
    total.backward()
    torch.testing.assert_close(total.detach(), tensors["loss"], **EXPECT)
    for level, student in students.items():
        gradients = [tensors[f"grad_student_{level}_global"]]
        if level != "patch":
            gradients.append(tensors[f"grad_student_{level}_local"])
        torch.testing.assert_close(student.grad.flatten(0, 1), torch.cat(gradients), **EXPECT)
    consolidation.update()
    for level, value in zip(names, tensors["center_out"], strict=True):
        torch.testing.assert_close(centers[level].value[0], value, **EXPECT)


def ranks_case(case, rank):
    tensors = case.under(f"rank{rank}_")
    batch = len(tensors["teacher_cls"]) // 2
    points = PatchVectors(
        *(tensors[name].unflatten(0, (2, batch)) for name in ("teacher_patch_global", "weight_global"))
    )
    local = PatchVectors(*(tensors[name].unflatten(1, (2, batch)) for name in ("teacher_patch_local", "weight_local")))
    return tensors, points, local


def run_golden_rank(rank, port, case, answers):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    tensors, points, local = ranks_case(case, rank)
    consolidation = Consolidation(
        case.tensors["center_in"].shape[1], case.params["center_momentum"], average=over_ranks
    ).double()
    centers = [consolidation.class_center, consolidation.plus_center, consolidation.patch_center]
    for center, value in zip(centers, case.tensors["center_in"], strict=True):
        center.value.copy_(value)
    consolidation.class_center.observe(tensors["teacher_cls"])
    for name in ("mixture_global", "mixture_local"):
        consolidation.plus_center.observe(tensors[name])
    for each in (points, local):
        consolidation.patch_center.observe_sum(each.sum.flatten(0, -2).sum(0), each.total.sum())
    consolidation.update()
    answers.put((rank, torch.cat([center.value for center in centers]).numpy()))
    dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.ddp
def test_golden_ranks(golden):
    """The official mean of the ranks' means."""
    case = golden("udi/center_two_ranks")
    assert case.params["world_size"] == 2
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(run_golden_rank, (free_port(), case, answers), nprocs=2)
    for _ in range(2):
        _, centers = answers.get()
        torch.testing.assert_close(torch.from_numpy(centers), case.tensors["center_out"], **EXPECT)


def run_rank_without_points(rank, port, answers):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for average in (over_ranks, over_samples):
        center = Center(2, 0.5, average)
        there = torch.full((3,), rank == 1)
        rows = torch.tensor([[2.0, 4.0]] * int(there.sum())).view(-1, 2)
        center.observe_sum(rows.sum(0), torch.tensor(float(len(rows))))
        center.update()
        logits = torch.zeros_like(rows).requires_grad_()
        loss = point_entropy(center(rows, 1.0), logits, there)
        loss.backward()
        answers.put((rank, float(loss), center.value.tolist()))
        center.observe_sum(torch.zeros(2), torch.tensor(0.0))
        center.update()
        answers.put((rank, float(loss), center.value.tolist()))
    dist.destroy_process_group()


@pytest.mark.ddp
def test_ranks():
    """A rank without any point: finite, the center is that of the other, and stays where no rank has one."""
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(run_rank_without_points, (free_port(), answers), nprocs=2)
    for _ in range(8):
        rank, loss, center = answers.get()
        assert center == [[1.0, 2.0]]
        assert loss == 0 if rank == 0 else loss == pytest.approx(2 * 0.6931, rel=1e-3)  # twice: of two ranks one has it


def test_no_points_at_all():
    consolidation = Consolidation(4)
    class_logits = torch.randn(2, 3, 4)
    nothing = PatchVectors(torch.randn(2, 3, 5, 4), torch.zeros(2, 3, 5))
    local = PatchVectors(torch.randn(1, 2, 3, 2, 4), torch.zeros(1, 2, 3, 2))
    targets = consolidation(class_logits, nothing, local, nn.Identity(), 0.1)
    torch.testing.assert_close(targets.plus_global, targets.class_targets.flip(0))  # the image's own target
    consolidation.update()
    assert consolidation.patch_center.value.eq(0).all()
    there = torch.zeros(2, 3, 5, dtype=torch.bool)
    logits = torch.zeros(2, 3, 5, 4, requires_grad=True)
    loss = point_entropy(targets.patch_targets[there], logits[there], there)
    loss.backward()
    assert loss == 0
    assert logits.grad.eq(0).all()


def test_empty_shares():
    total = torch.tensor([0.0, 0.2, 3.0])
    assert class_where_empty(total, 0.5).tolist() == [0.0, 0.5, 0.5]
    assert shrink_where_empty(total, 0.5).tolist() == [0.5, 0.5, 0.5]


def test_blend_of_probabilities_is_a_mixture():
    consolidation = Consolidation(3, blend=blend_probabilities)
    sharp = 100 * torch.eye(3)
    class_logits = sharp[0].expand(2, 1, 3)
    points = PatchVectors(sharp[1:].expand(2, 1, 2, 3), torch.tensor([1.0, 3.0]).expand(2, 1, 2))
    none = PatchVectors(torch.zeros(0, 2, 1, 2, 3), torch.zeros(0, 2, 1, 2))
    targets = consolidation(class_logits, points, none, nn.Identity(), 1.0)
    torch.testing.assert_close(targets.plus_global[0, 0], torch.tensor([0.5, 0.125, 0.375]), rtol=1e-4, atol=1e-5)
    assert targets.plus_global[0, 0].sum() < 1  # by the constant that keeps the mean of no points finite


def test_alpha_may_be_all_or_nothing():
    for alpha in (0.0, 1.0):
        assert Consolidation(4, alpha=alpha).alpha == alpha


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Consolidation(4, alpha=1.5), r"`alpha` .* got 1.5"),
        (lambda: Consolidation(4, alpha=-0.5), r"`alpha` .* got -0.5"),
        (lambda: Center(4, momentum=-0.1), r"`momentum` must lie in \[0, 1\], got -0.1"),
        (
            lambda: paired_entropy(torch.ones(2, 1, 3), torch.ones(1, 1, 3), torch.ones(2, 1, 3)),
            "`logits` must have one stack for each of 3 crops, got 2",
        ),
        (
            lambda: point_entropy(torch.ones(1, 3), torch.ones(1, 3), torch.ones(2, dtype=torch.bool)),
            "`logits` must have one row for each of 2 points, got 1",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
