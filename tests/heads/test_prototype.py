import copy

import pytest
import torch
from torch import nn

from ssl_distill.heads.network import Network, per_view
from ssl_distill.heads.prototype import FreePrototypes, PrototypeHead, UnitPrototypes


def head_of(params):
    """The head a golden file was made with."""
    return PrototypeHead(
        params["in_dim"],
        params["out_dim"],
        hidden_dim=params["hidden_dim"],
        bottleneck_dim=params["bottleneck_dim"],
        num_layers=params["nlayers"],
        norm=nn.BatchNorm1d if params["use_bn"] else None,
        prototypes=UnitPrototypes if params["norm_last_layer"] else FreePrototypes,
    ).double()


def ours(name: str) -> str:
    """A single linear layer is called `mlp` officially and `mlp.0` here."""
    return name.replace("mlp.weight", "mlp.0.weight").replace("mlp.bias", "mlp.0.bias")


def test_golden(golden):
    for name in golden.cases("dino/head_*"):
        case = golden(name)
        head = head_of(case.params)
        state = {ours(key): value for key, value in case.under("state.").items()}
        norms = [module for module in head.modules() if isinstance(module, nn.BatchNorm1d)]
        assert {(norm.eps, norm.momentum) for norm in norms} <= {(case.params["bn_eps"], case.params["bn_momentum"])}
        head.train(case.params["mode"] == "train")
        assert not head.load_state_dict(state, strict=False).unexpected_keys
        assert {key for key in head.state_dict() if "num_batches" not in key} == set(state)
        x = case.tensors["x"].requires_grad_()

        y = head(x)
        y.backward(case.tensors["grad_y"])

        expect = {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(y, case.tensors["y"], **expect)
        torch.testing.assert_close(x.grad, case.tensors["grad_x"], **expect)
        gradients = {key: value.grad for key, value in head.named_parameters() if value.grad is not None}
        expected = {ours(key): value for key, value in case.under("grad.").items()}
        assert set(gradients) == set(expected)
        assert {key for key, value in head.named_parameters() if value.grad is None} == set(case.params["no_grad_for"])
        torch.testing.assert_close(gradients, expected, **expect)
        for key, value in case.under("after.").items():
            torch.testing.assert_close(head.state_dict()[key], value, **expect)
        if "y_eval_after" in case.tensors:
            torch.testing.assert_close(head.eval()(x), case.tensors["y_eval_after"], **expect)


def test_initialisation():
    head = PrototypeHead(64, 500, hidden_dim=128, bottleneck_dim=256)
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert head.mlp[0].bias.abs().max() == 0
    # Uniform in +-1/sqrt(256): a row of 256 has length 1/sqrt(3).
    assert head.last_layer.weight_v.norm(dim=1).mean().item() == pytest.approx(3**-0.5, rel=0.02)
    assert not head.last_layer.weight_g.requires_grad


def test_head_can_be_copied_after_a_forward():
    head = PrototypeHead(4, 6, hidden_dim=8, bottleneck_dim=4)
    x = torch.randn(3, 4)
    torch.testing.assert_close(head(x), copy.deepcopy(head)(x), rtol=0, atol=0)


def test_network_runs_one_pass_per_resolution():
    calls = []

    class Recorder(nn.Module):
        def forward(self, images):
            calls.append(tuple(images.shape))
            return images.mean((2, 3))

    network = Network(Recorder(), nn.Linear(3, 5))
    stacks = [torch.randn(2, 4, 3, 8, 8), torch.randn(3, 4, 3, 4, 4), torch.randn(0, 4, 3, 2, 2)]
    logits = network(stacks)
    assert calls == [(8, 3, 8, 8), (12, 3, 4, 4)]
    assert logits.shape == (5, 4, 5)
    torch.testing.assert_close(logits[3], network.head(stacks[1][1].mean((2, 3))))
    assert per_view(nn.Flatten(), stacks[0]).shape == (2, 4, 192)


@pytest.mark.parametrize("argument", ["num_prototypes", "hidden_dim", "bottleneck_dim", "num_layers"])
def test_errors(argument):
    arguments = {"num_prototypes": 4, "hidden_dim": 4, "bottleneck_dim": 4, "num_layers": 2}
    with pytest.raises(ValueError, match=f"`{argument}` must be at least 1, got 0"):
        PrototypeHead(3, **{**arguments, argument: 0})
