import pytest
import torch
from torch import nn

from ssl_distill.heads.token import SeparateTokenHead, TokenHead


def golden_head(case):
    sizes = {
        "hidden_dim": case.params["hidden_dim"],
        "bottleneck_dim": case.params["bottleneck_dim"],
        "num_layers": case.params["nlayers"],
    }
    if case.params["shared_head"]:
        head = TokenHead(case.params["in_dim"], case.params["out_dim"], **sizes)
    else:
        head = SeparateTokenHead(case.params["in_dim"], case.params["out_dim"], case.params["patch_out_dim"], **sizes)
    head.double().load_state_dict(case.under("w/"))
    return head


def test_golden(golden):
    expect = {"rtol": 1e-9, "atol": 1e-10}
    for name in golden.cases("ibot/head_*"):
        case = golden(name)
        tensors = case.tensors
        head = golden_head(case)
        x = tensors["x"].requires_grad_()
        logits = head(x[:, 0], x[:, 1:])
        torch.testing.assert_close(logits.class_logits, tensors["cls_logits"], **expect)
        torch.testing.assert_close(logits.patch_logits, tensors["patch_logits"], **expect)
        (logits.class_logits * tensors["cot_cls"]).sum().backward(retain_graph=True)
        (logits.patch_logits * tensors["cot_patch"]).sum().backward()
        torch.testing.assert_close(x.grad, tensors["grad_x"], **expect)
        for key, parameter in head.named_parameters():
            torch.testing.assert_close(parameter.grad, tensors[f"grad_w/{key}"], **expect)
        alone = head(tensors["x_cls_only"], x[:0, 0]).class_logits
        torch.testing.assert_close(alone, tensors["cls_only_logits"], **expect)


def test_golden_mean_and_masked_are_those_of_all_logits(golden):
    for name in golden.cases("ibot/head_*"):
        case = golden(name)
        head, x = golden_head(case), case.tensors["x"]
        masked = torch.rand(x.shape[0], x.shape[1] - 1, generator=torch.Generator().manual_seed(0)) < 0.5
        logits, mean = head.masked_and_mean(x[:, 0], x[:, 1:], masked)
        everything = case.tensors["patch_logits"]
        torch.testing.assert_close(logits.patch_logits, everything[masked])
        torch.testing.assert_close(mean, everything.mean(1))
        torch.testing.assert_close(logits.class_logits, case.tensors["cls_logits"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(dtype):
    head = SeparateTokenHead(8, 5, 7, hidden_dim=6, bottleneck_dim=4).to(dtype)
    logits = head(torch.randn(3, 2, 8, dtype=dtype), torch.randn(0, 8, dtype=dtype))
    assert logits.class_logits.shape == (3, 2, 5)
    assert logits.patch_logits.shape == (0, 7)
    assert {id(p) for p in head.last_layers.parameters()} == {
        id(p) for name, p in head.named_parameters() if "last_layer" in name
    }


@pytest.mark.parametrize("num_patches", [0, 1, 40])
def test_batch_norm_of_class_tokens_does_not_see_patches(num_patches):
    head = TokenHead(8, 5, hidden_dim=6, bottleneck_dim=4, norm=nn.BatchNorm1d)
    class_tokens, patch_tokens = torch.randn(6, 8), torch.randn(num_patches, 8)
    logits = head(class_tokens, patch_tokens)
    assert logits.patch_logits.shape == (num_patches, 5)
    if num_patches > 1:
        torch.testing.assert_close(logits.class_logits, head(class_tokens, 10 * patch_tokens).class_logits)
        again, _ = head.masked_and_mean(class_tokens[:2], patch_tokens.view(2, 20, 8), torch.ones(2, 20) > 0)
        torch.testing.assert_close(again.patch_logits, logits.patch_logits)


def test_errors():
    with pytest.raises(ValueError, match="`num_patch_prototypes` must be at least 1, got 0"):
        SeparateTokenHead(8, 5, 0)
