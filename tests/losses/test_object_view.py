import pytest
import torch

from ssl_distill.losses.cross_view import cross_view_entropy
from ssl_distill.losses.masked_token import masked_token_entropy
from ssl_distill.losses.object_view import mean_over_images, mean_over_valid, object_view_entropy
from ssl_distill.targets.center import Center

EXPECT = {"rtol": 1e-9, "atol": 1e-10}


def center_at(value, momentum):
    center = Center(value.shape[-1], momentum).double()
    center.value.copy_(value.reshape(1, -1))
    return center


def test_golden(golden):
    for name in golden.cases("odis/loss_*"):
        case = golden(name)
        tensors, params = case.tensors, case.params
        views, batch = params["G"], params["B"]
        valid = tensors["obj_valid"]
        teacher = tensors["teacher_obj"].unflatten(0, (views, batch))
        targets = center_at(tensors["center_obj_in"], 0.9)(teacher, params["teacher_temp_obj"])
        students = [tensors[key].requires_grad_() for key in ("student_obj", "student_local_obj")]
        for average, suffix in ((mean_over_images, "batch"), (mean_over_valid, "valid")):
            logits = torch.cat(students).unflatten(0, (-1, batch))  # (V, B, O, K)
            loss = object_view_entropy(targets, logits, valid, params["student_temp"], average)
            torch.testing.assert_close(loss, tensors[f"loss_obj_{suffix}"], **EXPECT)
            gradients = torch.autograd.grad(loss, students)
            for key, gradient in zip(("student_obj", "student_local_obj"), gradients, strict=True):
                torch.testing.assert_close(gradient, tensors[f"grad_{key}_{suffix}"], **EXPECT)


def test_golden_patches(golden):
    for name in golden.cases("odis/loss_*"):
        case = golden(name)
        tensors, params = case.tensors, case.params
        masked = tensors["mim_masks"].flatten(0, 1).flatten(1)
        center = center_at(tensors["center_patch_in"], params["center_momentum"])
        targets = center(tensors["teacher_patch"][masked], params["teacher_temp_patch"])
        student = tensors["student_patch"].requires_grad_()
        loss = masked_token_entropy(targets, student[masked], masked, params["student_temp"])
        loss.backward()
        torch.testing.assert_close(loss, tensors["loss_patch"], **EXPECT)
        torch.testing.assert_close(student.grad, tensors["grad_student_patch"], **EXPECT)
        center.observe(tensors["teacher_patch"].mean(1))
        center.update()
        torch.testing.assert_close(center.value, tensors["center_patch_out"][0], **EXPECT)


def test_golden_centers(golden):
    for name in golden.cases("odis/loss_*"):
        case = golden(name)
        tensors, params = case.tensors, case.params
        teacher = tensors["teacher_obj"]  # (T B, O, K)
        start, momentum = tensors["center_obj_in"], params["center_momentum"]
        valid = tensors["obj_valid"][: params["G"]].flatten(0, 1)  # (T B, O)
        centers = [center_at(start[0, slot if start.shape[1] > 1 else 0], momentum) for slot in range(params["O"])]
        for slot, center in enumerate(centers):  # the variant with one center for each slot, over all rows
            center.observe(teacher[:, slot])
            center.update()
            torch.testing.assert_close(center.value[0], tensors["center_obj_out_all"][0, slot], **EXPECT)
        center = center_at(start[0, 0], momentum)
        center.observe(teacher[valid])
        center.update()
        torch.testing.assert_close(center.value, tensors["center_obj_out_valid"][0], **EXPECT)


def test_all_valid_is_the_loss_over_views():
    targets, logits = torch.rand(2, 3, 7).softmax(-1), torch.randn(4, 3, 7)
    valid = torch.ones(4, 3, dtype=torch.bool)
    expected = cross_view_entropy(targets, logits, 0.1)
    for average in (mean_over_images, mean_over_valid):
        torch.testing.assert_close(object_view_entropy(targets, logits, valid, 0.1, average), expected)


def test_nothing_valid_is_a_loss_of_zero_with_a_gradient():
    targets, logits = torch.rand(2, 3, 7).softmax(-1), torch.randn(3, 3, 7, requires_grad=True)
    for average in (mean_over_images, mean_over_valid):
        loss = object_view_entropy(targets, logits, torch.zeros(3, 3, dtype=torch.bool), 0.1, average)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0
        assert not gradient.any()


def test_two_views_are_enough():
    targets, logits = torch.rand(2, 3, 7).softmax(-1), torch.randn(2, 3, 7)
    valid = torch.ones(2, 3, dtype=torch.bool)
    for some in (targets, targets[:1]):
        expected = cross_view_entropy(some, logits)
        torch.testing.assert_close(object_view_entropy(some, logits, valid), expected)


@pytest.mark.parametrize(("teacher_views", "views"), [(1, 1), (2, 1), (3, 2)])
def test_errors(teacher_views, views):
    with pytest.raises(ValueError, match=f"`logits` .* {teacher_views} views .* got {views}"):
        object_view_entropy(
            torch.ones(teacher_views, 3, 4), torch.ones(views, 3, 4), torch.ones(views, 3, dtype=torch.bool)
        )
