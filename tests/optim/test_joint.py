import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from ssl_distill.optim.joint import JointOptimizer, momentum_sgd, sgd_and_adamw
from ssl_distill.optim.lars import LARS
from ssl_distill.optim.parameters import adamw, clip_each_tensor
from ssl_distill.optim.token_groups import token_head_on_partner, token_head_on_partner_split


def test_golden_token_head_groups(golden):
    """SGD of a ConvNet whose token head follows the ViT's schedules, behind a joint optimiser."""
    case = golden("mokd/sgd_cnn_groups")
    params = {name: nn.Parameter(value.clone()) for name, value in case.under("in_").items()}
    groups = [{"params": [params[name] for name in names]} for names in case.params["groups"]]
    other = nn.Parameter(torch.ones(2))
    optimizer = JointOptimizer([momentum_sgd(groups, case.params["momentum"]), adamw([other])])
    assert {group["nesterov"] for group in optimizer.param_groups[:-1]} == {case.params["nesterov"]}
    for i, (lr_cnn, lr_vit) in enumerate(zip(case.params["lr_cnn"], case.params["lr_vit"], strict=True)):
        knobs = [(lr_cnn, case.params["wd_cnn"][i]), (lr_cnn, 0.0), (lr_vit, case.params["wd_vit"][i]), (0.1, 0.0)]
        for group, (rate, decay) in zip(optimizer.param_groups, knobs, strict=True):
            group["lr"], group["weight_decay"] = rate, decay
        for name, parameter in params.items():
            parameter.grad = case.tensors[f"grad_{i}_{name}"]
        other.grad = torch.ones(2)
        optimizer.step()
        torch.testing.assert_close(
            {name: value.detach() for name, value in params.items()}, case.under(f"out_{i}_"), rtol=1e-9, atol=1e-12
        )
    assert (other < 0.8).all()


def test_golden_lars(golden):
    case = golden("mokd/lars_optional")
    params = {name: nn.Parameter(case.tensors[f"{name}_in"].clone()) for name in ("w", "b")}
    p = case.params
    optimizer = LARS(params.values(), p["lr"], p["weight_decay"], p["momentum"], p["eta"])
    for i in range(len(case.under("grad_")) // 2):
        for name, parameter in params.items():
            parameter.grad = case.tensors[f"grad_{i}_{name}"]
        optimizer.step()
        torch.testing.assert_close(
            {name: value.detach() for name, value in params.items()}, case.under(f"out_{i}_"), rtol=1e-9, atol=1e-12
        )


def test_golden_clipping(golden):
    case = golden("mokd/clip_per_parameter")
    gradients = {name: value.double() for name, value in case.under("grad_in_").items()}
    params = {name: nn.Parameter(torch.zeros_like(value)) for name, value in gradients.items()}
    for name, parameter in params.items():
        parameter.grad = gradients[name].clone()
    without = nn.Parameter(torch.zeros(3))
    clip_each_tensor([*params.values(), without], case.params["clip"])
    assert without.grad is None
    clipped = {name: parameter.grad.float() for name, parameter in params.items()}
    torch.testing.assert_close(clipped, case.under("grad_out_"), rtol=1e-6, atol=1e-8)


def joined(model):
    first, second = model
    return JointOptimizer([momentum_sgd(first.parameters()), adamw(second.parameters())])


def two_models():
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])


def steps(model, optimizer, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(4, 3, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.1

        def closure(x=x):
            optimizer.zero_grad()
            loss = (model[0](x) ** 2).sum() + (model[1](x) ** 2).sum()
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0


def test_equals_its_parts_alone():
    model, alone = two_models(), two_models()
    steps(model, joined(model), 3)
    for part, make in zip(alone, (momentum_sgd, adamw), strict=True):
        optimizer = make(part.parameters())
        steps(nn.ModuleList([part, part.__class__(3, 2)]), optimizer, 3)
    torch.testing.assert_close(list(model.parameters()), list(alone.parameters()), rtol=0, atol=0)


def test_resumes_from_its_state(tmp_path):
    whole, first = two_models(), two_models()
    steps(whole, joined(whole), 2)
    optimizer = joined(first)
    steps(first, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")

    resumed = copy.deepcopy(first)
    again = joined(resumed)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(first, optimizer, 2, seed=1)
    steps(resumed, again, 2, seed=1)
    torch.testing.assert_close(list(resumed.parameters()), list(first.parameters()), rtol=0, atol=0)


def test_lightning_counts_one_step(tmp_path):
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.parts = two_models()
            self.steps_at = []

        def training_step(self, batch, batch_idx):
            self.steps_at.append(self.trainer.global_step)
            return sum(part(batch).sum() for part in self.parts)

        def configure_optimizers(self):
            return joined(self.parts)

    module = Module()
    trainer = Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(6, 3)))
    assert module.steps_at == [0, 0, 1, 1, 2, 2]
    assert trainer.global_step == 3


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 2)
        self.token_head = nn.Linear(2, 2)


def test_token_head_groups():
    network = Network()
    own, vectors, together = token_head_on_partner(network)
    assert (own["params"], vectors["params"]) == ([network.backbone.weight], [network.backbone.bias])
    assert together["params"] == list(network.token_head.parameters())
    assert together["schedule"] == "partner"

    optimizer = sgd_and_adamw(token_head_on_partner_split(network))
    kinds = [type(part).__name__ for part in optimizer.optimizers for _ in part.param_groups]
    assert kinds == ["SGD", "SGD", "AdamW", "AdamW"]
    assert [group["decayed"] for group in optimizer.param_groups] == [True, False, True, False]


def test_errors():
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="`optimizers` must hold at least one optimiser, got none"):
        JointOptimizer([])
    with pytest.raises(ValueError, match="more than one parameter group"):
        JointOptimizer([momentum_sgd([parameter]), adamw([parameter])])
    with pytest.raises(ValueError, match="`param_group` must be added to one of `optimizers` before"):
        JointOptimizer([adamw([parameter])]).add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
