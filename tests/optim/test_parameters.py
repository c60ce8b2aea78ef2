import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ssl_distill.heads.network import Network
from ssl_distill.heads.prototype import FreePrototypes, PrototypeHead, UnitPrototypes
from ssl_distill.optim.lars import LARS
from ssl_distill.optim.parameters import adamw, clip_each_tensor, decay_groups


@pytest.mark.parametrize("prototypes", [UnitPrototypes, FreePrototypes])
def test_golden_groups(golden, prototypes):
    case = golden("dino/param_groups")
    backbone = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=0)
    norm = nn.BatchNorm1d if case.params["head_use_bn"] else None
    student = Network(backbone, PrototypeHead(8, 4, hidden_dim=8, bottleneck_dim=4, norm=norm, prototypes=prototypes))
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decayed, undecayed = ([names.pop(id(p)) for p in group["params"]] for group in decay_groups(student))

    expected = case.params[f"norm_last_layer_{prototypes is UnitPrototypes}"]
    assert sorted(decayed) == sorted(expected["regularized"])
    assert sorted(undecayed) == sorted(expected["not_regularized"])
    assert sorted(names.values()) == sorted(expected.get("not_in_any_group", []))


def test_golden_clip(golden):
    case = golden("dino/clip_freeze")
    clipped = case.under("grad_clipped.")
    parameters = {name: nn.Parameter(torch.zeros_like(value)) for name, value in clipped.items()}
    for name, parameter in parameters.items():
        parameter.grad = case.tensors[f"grad_in.{name}"].clone()
    clip_each_tensor([*parameters.values(), nn.Parameter(torch.zeros(1))], case.params["clip"])
    ours = {name: parameter.grad for name, parameter in parameters.items()}
    torch.testing.assert_close(ours, clipped, rtol=1e-6, atol=1e-9)


def test_golden_lars(golden):
    case = golden("dino/lars")
    params = {name: nn.Parameter(value.clone()) for name, value in case.under("init.").items()}
    groups = [
        {"params": [params[name] for name in case.params[f"group{i}"]],
         "weight_decay": case.params[f"weight_decay_group{i}"]} for i in range(2)
    ]  # fmt: skip
    optimizer = LARS(groups, momentum=case.params["momentum"], trust_coefficient=case.params["eta"])
    for step, rate in enumerate(case.params["lrs"]):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in params.items():
            parameter.grad = case.tensors[f"grad{step}.{name}"].clone()
        optimizer.step()
        for name, parameter in params.items():
            torch.testing.assert_close(parameter.data, case.tensors[f"after{step}.{name}"], rtol=1e-6, atol=1e-9)


def test_golden_lars_is_not_timms(golden):
    """The reason for our own class: the day timm's agrees with the official one, ours can go."""
    from timm.optim import Lars

    case = golden("dino/lars")
    ours, theirs = (nn.Parameter(case.tensors["init.w"].clone()) for _ in range(2))
    ours.grad = theirs.grad = case.tensors["grad1.w"].clone()
    LARS([ours], lr=0.3, weight_decay=0.01).step()
    Lars([theirs], lr=0.3, weight_decay=0.01, momentum=0.9).step()
    assert not torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_adamw_is_fused_and_equals_the_plain_one():
    torch.manual_seed(0)
    fused, plain = (nn.Parameter(torch.ones(5, 3, dtype=torch.float64)) for _ in range(2))
    assert adamw([fused]).param_groups[0]["lr"] == 0  # schedules set it, and nobody forgets them unseen
    ours, theirs = adamw([fused]), torch.optim.AdamW([plain], lr=0.1, weight_decay=0.2)
    ours.param_groups[0].update(lr=0.1, weight_decay=0.2)
    for _ in range(3):
        fused.grad = plain.grad = torch.randn(5, 3, dtype=torch.float64)
        ours.step()
        theirs.step()
    torch.testing.assert_close(fused, plain)
