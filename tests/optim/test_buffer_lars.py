import torch
from torch import nn

from ssl_distill.optim.buffer_lars import BufferLARS
from ssl_distill.optim.parameters import decay_groups
from ssl_distill.optim.schedules import EpochCosine, Position


def test_golden(golden):
    case = golden("pcd/lars_steps")
    inputs, p = case.under("in_"), case.params
    params = {name: nn.Parameter(value.clone()) for name, value in inputs.items()}
    groups = [
        {"params": [params[name] for name in p["adapted"]], "weight_decay": p["weight_decay"]},
        {"params": [params[name] for name in p["not_adapted_no_decay"]], "weight_decay": 0.0},
    ]
    optimizer = BufferLARS(groups, momentum=p["momentum"], trust_coefficient=p["eta"])
    for i, rate in enumerate(p["lr"]):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in params.items():
            parameter.grad = case.tensors[f"grad_{i}_{name}"]
        optimizer.step()
        found = {name: value.detach() for name, value in params.items()}
        torch.testing.assert_close(found, case.under(f"out_{i}_"), rtol=1e-9, atol=1e-12)


def test_golden_learning_rate(golden):
    case = golden("pcd/lr_schedule")
    p = case.params
    curve = EpochCosine(p["base_lr"] / 4, 0.0, p["warmup_epochs"]).scaled(4)
    rates = [curve.at(Position(epoch, p["total_epochs"], 1)) for epoch in range(p["total_epochs"])]
    expected = case.tensors["lr_per_epoch"]
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)


def test_leaves_alone_what_has_no_gradient():
    layer = nn.Linear(2, 2)
    before = layer.weight.clone()
    BufferLARS(decay_groups(layer), lr=1.0).step()
    assert torch.equal(layer.weight, before)
