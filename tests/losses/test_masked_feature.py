import torch
import torch.nn.functional as F

from ssl_distill.losses.masked_feature import negative_cosine, smooth_l1, standardize

EXPECT = {"rtol": 1e-6, "atol": 1e-9}


def test_golden(golden):
    """The mask chooses rows; the official mean over masked rows is the mean over the rows that are left."""
    case = golden("dbot/loss")
    tensors = case.tensors
    wanted = tensors["mask"].bool()
    assert case.params["beta"] == 2
    assert case.params["var_unbiased"]
    targets = standardize(tensors["target"], case.params["norm_eps"])
    torch.testing.assert_close(targets, tensors["target_normalised"], **EXPECT)
    for name, target in {"norm": targets, "raw": tensors["target"]}.items():
        pred = tensors["pred"].clone().requires_grad_()
        loss = smooth_l1(pred[wanted], target[wanted])
        loss.backward()
        torch.testing.assert_close(loss.detach(), tensors[f"loss_{name}"], **EXPECT)
        torch.testing.assert_close(pred.grad, tensors[f"grad_pred_{name}"], **EXPECT)


def test_golden_symmetric(golden):
    case = golden("dbot/loss_symmetric")
    pred, target = case.tensors["pred"].clone().requires_grad_(), case.tensors["target"]
    loss = negative_cosine(pred, target, case.params["eps"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), case.tensors["loss_negcosine"], **EXPECT)
    torch.testing.assert_close(pred.grad, case.tensors["grad_negcosine"], **EXPECT)
    others = {"smoothl1_beta2": smooth_l1, "l1": F.l1_loss, "l2": F.mse_loss}
    for name, loss in others.items():
        torch.testing.assert_close(loss(pred.detach(), target), case.tensors[f"loss_{name}"], **EXPECT)


def test_half_precision_is_compared_in_float32():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 64, generator=generator) * 1e-2
    standard = standardize(features.half())
    assert standard.dtype == torch.float32
    torch.testing.assert_close(standard.var(-1), torch.ones(4), rtol=0.02, atol=0)
    loss = smooth_l1(torch.zeros(4, 64).half(), standard)
    assert loss.dtype == torch.float32
    assert 0.2 < float(loss) < 0.25
    assert standardize(features.double()).dtype == torch.float64
