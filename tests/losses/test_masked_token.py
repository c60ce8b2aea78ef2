import pytest
import torch

from ssl_distill.losses.cross_view import cross_view_entropy
from ssl_distill.losses.masked_token import masked_token_entropy
from ssl_distill.losses.row_entropy import row_entropy
from ssl_distill.targets.center import Center

EXPECT = {"rtol": 1e-9, "atol": 1e-10}


def center_at(value, momentum):
    center = Center(value.shape[-1], momentum).double()
    center.value.copy_(value.reshape(1, -1))
    return center


@pytest.mark.parametrize("name", ["ibot/loss_multicrop", "ibot/loss_nolocal_weighted"])
def test_golden(golden, name):
    """Both terms of iBOT, from masked patches alone."""
    case = golden(name)
    tensors, params = case.tensors, case.params
    views, batch = params["G"], params["B"]
    masked = tensors["masks"].flatten(2)  # (G, B, N)
    names = [key for key in ("student_cls", "student_local_cls", "student_patch") if key in tensors]
    for key in names:
        tensors[key].requires_grad_()
    class_center = center_at(tensors["center_in"], params["center_momentum"])
    patch_center = center_at(tensors["center2_in"], params["center_momentum_patch"])

    teacher_class = tensors["teacher_cls"].unflatten(0, (views, batch))
    class_logits = torch.cat([tensors[key] for key in names[:-1]]).unflatten(0, (-1, batch))
    class_targets = class_center(teacher_class, params["teacher_temp_at_epoch"])
    class_loss = params["lambda1"] * cross_view_entropy(class_targets, class_logits, params["student_temp"])

    rows = masked.flatten(0, 1)
    patch_targets = patch_center(tensors["teacher_patch"][rows], params["teacher_patch_temp_at_epoch"])
    patch_logits = tensors["student_patch"][rows]
    patch_loss = masked_token_entropy(patch_targets, patch_logits, masked, params["student_temp"])
    patch_loss = params["lambda2"] * patch_loss

    torch.testing.assert_close(class_loss, tensors["loss_cls"], **EXPECT)
    torch.testing.assert_close(patch_loss, tensors["loss_patch"], **EXPECT)
    torch.testing.assert_close(class_loss + patch_loss, tensors["loss"], **EXPECT)
    (class_loss + patch_loss).backward()
    for key in names:
        torch.testing.assert_close(tensors[key].grad, tensors[f"grad_{key}"], **EXPECT)

    class_center.observe(teacher_class)
    patch_center.observe(tensors["teacher_patch"].mean(1))
    for center, key in ((class_center, "center_out"), (patch_center, "center2_out")):
        center.update()
        torch.testing.assert_close(center.value.flatten(), tensors[key].flatten(), **EXPECT)


def test_gradient():
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(5, 7, dtype=torch.float64, generator=generator)
    targets[2] = 0
    logits = torch.randn(5, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    loss, expected = row_entropy(targets, logits, 0.3), -(targets * (logits / 0.3).log_softmax(-1)).sum()
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(3 * each, logits)[0] for each in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_by_default_logits_are_taken_as_they_are():
    targets, logits = torch.rand(6, 7), torch.randn(6, 7)
    masked = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(row_entropy(targets, logits), row_entropy(targets, logits, 1.0))
    expected = masked_token_entropy(targets, logits, masked, 1.0)
    torch.testing.assert_close(masked_token_entropy(targets, logits, masked), expected)


def test_large_logits_do_not_overflow():
    targets, logits = torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([[300.0, 301.0], [-900.0, -902.0]])
    expected = -(targets * logits.log_softmax(-1)).sum()
    torch.testing.assert_close(row_entropy(targets, logits), expected)


def test_targets_get_no_gradient():
    targets = torch.rand(3, 4, requires_grad=True)
    assert not row_entropy(targets, torch.randn(3, 4)).requires_grad


def test_chunks_of_rows_make_no_difference(monkeypatch):
    targets, logits = torch.rand(10, 4).softmax(-1), torch.randn(10, 4, requires_grad=True)
    whole = row_entropy(targets, logits, 0.1)
    (gradient,) = torch.autograd.grad(whole, logits)
    monkeypatch.setattr("ssl_distill.losses.row_entropy._ROWS_AT_ONCE", 3)
    parts = row_entropy(targets, logits, 0.1)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, logits)[0], gradient)


def test_no_masked_patch_is_a_loss_of_zero_with_a_gradient():
    logits = torch.empty(0, 4, requires_grad=True)
    loss = masked_token_entropy(torch.empty(0, 4), logits, torch.zeros(2, 3, 5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    logits, targets = torch.randn(6, 50), torch.randn(6, 50).softmax(-1)
    masked = torch.ones(2, 3, dtype=torch.bool)
    half, full = logits.to(dtype).requires_grad_(), logits.to(dtype).float().requires_grad_()
    losses = [masked_token_entropy(targets, each, masked, 0.1) for each in (half, full)]
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(*losses)
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(half.grad, full.grad.to(dtype))


def test_errors():
    with pytest.raises(ValueError, match="`logits` must have one row for each of 6 masked patches, got 5"):
        masked_token_entropy(torch.ones(5, 4), torch.ones(5, 4), torch.ones(2, 3, dtype=torch.bool))
