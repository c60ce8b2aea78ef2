"""DINO with the parts of a random teacher, against that paper's golden files."""

from functools import partial

import pytest
import torch
from harness import StoredViews, quiet_trainer
from lightning.pytorch import Callback, LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ssl_distill.callbacks.ema_teacher import ema_update
from ssl_distill.callbacks.frozen_teacher import FrozenTeacher
from ssl_distill.heads.prototype import PrototypeHead, UnitPrototypes
from ssl_distill.losses.cross_view import cross_view_entropy
from ssl_distill.losses.entropy import OutputEntropy
from ssl_distill.losses.koleo import KoLeo
from ssl_distill.losses.matched import matched_entropy
from ssl_distill.methods.dino import DINO
from ssl_distill.optim.parameters import adamw
from ssl_distill.optim.schedules import Cosine, EpochRamp
from ssl_distill.targets.center import Center
from ssl_distill.views import MultiCrop

EXPECT = {"rtol": 1e-6, "atol": 1e-9}
PLAIN_LINEAR = partial(nn.Linear, bias=False)  # what weight normalisation is in the released code
PROTOTYPES = {"paper_wn": UnitPrototypes, "code_no_wn": PLAIN_LINEAR}


def our_head_state(state, prototypes):
    """Weights of a golden head by our names."""
    ours = {}
    layers = sorted({name.split(".")[1] for name in state if name.startswith("mlp.")})
    for name, value in state.items():
        part, _, kind = name.rpartition(".")
        if part.startswith("mlp."):
            ours[f"mlp.{2 * layers.index(part.split('.')[1])}.{kind}"] = value
        elif part == "last_layer.lin1":
            ours[f"mlp.{2 * len(layers)}.{kind}"] = value
        elif part == "last_layer.lin2" and prototypes is UnitPrototypes:
            ours |= {"last_layer.weight_v": value, "last_layer.weight_g": torch.ones_like(value[:, :1])}
        elif part == "last_layer.lin2":
            ours["last_layer.weight"] = value
    return ours


@pytest.mark.parametrize("behaviour", PROTOTYPES)
def test_golden_head(golden, behaviour):
    case = golden("random_teacher/head")
    params = case.params
    assert len(set(params["hidden"])) == 1
    head = PrototypeHead(
        params["embed_dim"],
        params["out_dim"],
        hidden_dim=params["hidden"][0],
        bottleneck_dim=params["bottleneck"],
        num_layers=len(params["hidden"]) + 1,
        prototypes=PROTOTYPES[behaviour],
    ).double()
    head.load_state_dict(our_head_state(case.under("state."), PROTOTYPES[behaviour]))
    x = case.tensors["x"].requires_grad_()
    y = head(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    torch.testing.assert_close(y, case.tensors[f"y_{behaviour}"], **EXPECT)
    y.backward(case.tensors["grad_y"])
    torch.testing.assert_close(x.grad, case.tensors[f"grad_x_{behaviour}"], **EXPECT)
    expected = our_head_state(case.under(f"grad_{behaviour}."), PROTOTYPES[behaviour])
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], **EXPECT)


def test_golden_bottlenecks(golden):
    """Those of the grammar's bottlenecks that `PrototypeHead` and `UnitPrototypes` make."""
    case = golden("random_teacher/bottleneck_configs")
    params = case.params
    sizes = {"in_dim": params["in_dim"], "num_prototypes": params["out_dim"], "bottleneck_dim": params["mid_dim"]}
    made = {
        "-/lb/fn/wn/l/-": lambda: PrototypeHead(**sizes, num_layers=1),
        "-/lb/fn/-/l/-": lambda: PrototypeHead(**sizes, num_layers=1, prototypes=PLAIN_LINEAR),
        "-/lb/-/wn/l/-": lambda: nn.Sequential(
            nn.Linear(params["in_dim"], params["mid_dim"]), UnitPrototypes(params["mid_dim"], params["out_dim"])
        ),
    }
    tried = 0
    for number, grammar in enumerate(params["cfgs"]):
        if grammar not in made:
            continue
        tried += 1
        module = made[grammar]().double()
        weights = case.under(f"cfg{number}.")
        first, *others = (parameter for parameter in module.parameters() if parameter.ndim == 2)
        first.data.copy_(weights["lin1.weight"])
        others[-1].data.copy_(weights["lin2.weight"])
        next(parameter for parameter in module.parameters() if parameter.ndim == 1).data.copy_(weights["lin1.bias"])
        x = case.tensors["x"].clone().requires_grad_()
        y = module(x)
        torch.testing.assert_close(y, weights["y"], **EXPECT)
        y.backward(weights["grad_y"])
        torch.testing.assert_close(x.grad, weights["grad_x"], **EXPECT)
        torch.testing.assert_close(first.grad, weights["grad.lin1.weight"], **EXPECT)
        torch.testing.assert_close(others[-1].grad, weights["grad.lin2.weight"], **EXPECT)
    assert tried


def test_golden_losses(golden):
    """Cross-entropy of the same and of opposite views; the divergence differs by the teacher's entropy only."""
    case = golden("random_teacher/losses")
    targets = case.tensors["teacher_logits"].softmax(-1)
    entropy = torch.special.entr(targets).sum(-1).mean()
    num_teacher = len(targets)
    compared = {
        "same": lambda logits: matched_entropy(targets, logits[:num_teacher], 1.0),
        "opposite": lambda logits: cross_view_entropy(targets, logits, 1.0),
    }
    for pairing, compare in compared.items():
        logits = case.tensors["student_logits"].clone().requires_grad_()
        loss = compare(logits)
        loss.backward()
        torch.testing.assert_close(loss.detach(), case.tensors[f"loss_CE_{pairing}"], **EXPECT)
        torch.testing.assert_close(logits.grad, case.tensors[f"grad_CE_{pairing}"], **EXPECT)
        torch.testing.assert_close(loss.detach() - entropy, case.tensors[f"loss_KL_{pairing}"], **EXPECT)
        torch.testing.assert_close(logits.grad, case.tensors[f"grad_KL_{pairing}"], **EXPECT)
    logits = case.tensors["student_logits"][:1].clone().requires_grad_()
    loss = matched_entropy(targets[:1], logits, 1.0)
    loss.backward()
    torch.testing.assert_close(loss.detach(), case.tensors["single_CE"], **EXPECT)
    torch.testing.assert_close(logits.grad, case.tensors["single_grad"], **EXPECT)


def test_golden_centering(golden):
    case = golden("random_teacher/centering")
    center = Center(case.tensors["cent_after_0"].shape[-1], case.params["momentum"]).double()
    for step in range(case.params["n_steps"]):
        projections = case.tensors[f"projections_{step}"]
        targets = center(projections, case.params["temp"])
        torch.testing.assert_close(targets, case.tensors[f"logits_{step}"].softmax(-1), **EXPECT)
        center.observe(projections)
        center.update()
        torch.testing.assert_close(center.value[0], case.tensors[f"cent_after_{step}"], **EXPECT)


def test_golden_teacher_update(golden):
    case = golden("random_teacher/teacher_update")
    width, in_dim = case.tensors["student.0.weight"].shape
    student, teacher = (nn.Sequential(nn.Linear(in_dim, width), nn.BatchNorm1d(width)).double() for _ in range(2))
    student.load_state_dict(case.under("student."), strict=False)
    teacher.load_state_dict(case.under("teacher_in."), strict=False)
    ema_update(student, teacher, case.params["momentum"])
    for name, value in case.under("teacher_ema_own_bn.").items():
        torch.testing.assert_close(teacher.state_dict()[name], value, **EXPECT)


class Encoder(nn.Module):
    """The golden runs': linear layers, batch norms, GELUs."""

    def __init__(self, in_dim, widths):
        super().__init__()
        self.num_features = widths[-1]
        layers = []
        for width_in, width in zip([in_dim, *widths], widths, strict=False):
            layers += [nn.Linear(width_in, width), nn.BatchNorm1d(width), nn.GELU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images):
        return self.layers(images[:, 0].flatten(1))


def our_state(state, prototypes):
    """A golden network by our names; it counts no batches."""
    parts = {"lin": 0, "norm": 1}
    ours = {}
    for name, value in state.items():
        if name.startswith("enc."):
            _, layer, part, kind = name.split(".")
            ours[f"backbone.layers.{3 * int(layer.removeprefix('layer')) + parts[part]}.{kind}"] = value
    head = {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}
    return ours | {f"head.{name}": value for name, value in our_head_state(head, prototypes).items()}


class StoredSteps(Dataset):
    def __init__(self, case):
        self.case = case

    def __len__(self):
        return self.case.params["steps"]

    def __getitem__(self, step):
        rows = self.case.tensors[f"x_{step}"]
        crop = rows[None, :, None, None].expand(-1, -1, 3, -1, -1)  # (1, B, 3, 1, in_dim): images by their shape
        return MultiCrop(crop, crop[:0])


class StoredRun(LightningDataModule):
    def __init__(self, case):
        super().__init__()
        self.case = case

    def train_dataloader(self):
        return DataLoader(StoredSteps(self.case), batch_size=None)


class Recorder(Callback):
    def __init__(self):
        self.losses, self.divergences, self.teacher_modes = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach())
        self.divergences.append(pl_module.monitor()["kl"])
        self.teacher_modes.append(any(part.training for part in pl_module.teacher.modules()))


def decay_only_vectors(groups):
    """The released code leaves AdamW's own decay on what is not scheduled: biases and vectors."""
    return adamw([{**group, "decayed": not group["decayed"]} for group in groups])


RANDOM_TEACHER = {
    "targets": partial(Center, momentum=1.0),  # it stays at 0
    "compare": matched_entropy,
    "teacher_life": FrozenTeacher,
    "augment": StoredViews(),
    "learning_rate": Cosine(1e-3, 1e-3),
    "weight_decay": Cosine(0.0, 0.0),
    "reference_batch": None,
    "student_temperature": 1.0,
    "teacher_temperature": EpochRamp(1.0, 1.0),
    "freeze_last_layer_epochs": 0,
    "clip_norm": 0.0,
}


@pytest.mark.parametrize("behaviour", ["paper", "code"])
def test_golden(golden, tmp_path, behaviour):
    """Whole training steps through the Trainer: as the paper says, and as the released code behaves."""
    case = golden(f"random_teacher/train_run_{behaviour}")
    params = case.params
    prototypes = UnitPrototypes if params["wn_applied"] else PLAIN_LINEAR
    optimizer = decay_only_vectors if params["weight_decay_bias_and_1d"] else adamw
    decay = params["weight_decay_bias_and_1d"]
    method = DINO(
        backbone=Encoder(params["in_dim"], params["enc_hidden"]),
        num_prototypes=params["out_dim"],
        head=lambda in_dim, num_prototypes: PrototypeHead(
            in_dim,
            num_prototypes,
            hidden_dim=params["head_hidden"][0],
            bottleneck_dim=params["bottleneck"],
            num_layers=len(params["head_hidden"]) + 1,
            prototypes=prototypes,
        ),
        optimizer=optimizer,
        **{**RANDOM_TEACHER, "weight_decay": Cosine(decay, decay)},
    ).double()
    for branch in ("teacher", "student"):
        state = our_state(case.under(f"init_{branch}."), prototypes)
        getattr(method, branch).load_state_dict(state, strict=False)
        assert state.keys() <= getattr(method, branch).state_dict().keys()
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    recorder = Recorder()
    quiet_trainer(tmp_path, [recorder], max_epochs=1, precision="64-true").fit(method, StoredRun(case))

    torch.testing.assert_close(torch.stack(recorder.losses), case.tensors["losses"], **EXPECT)
    torch.testing.assert_close(torch.stack(recorder.divergences), case.tensors["kls"], rtol=1e-6, atol=1e-9)
    expected = our_state(case.under("student."), prototypes)
    for name, value in expected.items():
        # A bias before a batch norm has no gradient but rounding, which Adam makes steps of.
        atol = 2e-7 if behaviour == "code" or name.endswith("bias") else 1e-9
        torch.testing.assert_close(method.student.state_dict()[name], value, rtol=1e-6, atol=atol, msg=name)
    assert not any(recorder.teacher_modes)
    for name, value in method.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_golden_run_with_regularizers(golden, tmp_path):
    case = golden("random_teacher/train_run_paper")
    params = case.params
    method = DINO(
        backbone=Encoder(params["in_dim"], params["enc_hidden"]),
        num_prototypes=8,
        head=lambda in_dim, num_prototypes: PrototypeHead(in_dim, num_prototypes, 8, 4),
        regularizers={"koleo": KoLeo(0.1)},
        output_regularizers={"entropy": OutputEntropy(0.5)},
        **{**RANDOM_TEACHER, "student_temperature": 0.1},
    ).double()
    trainer = quiet_trainer(tmp_path, [Recorder()], max_epochs=1, precision="64-true")
    trainer.fit(method, StoredRun(case))
    logged = trainer.callback_metrics
    total = logged["train/class"] + logged["train/koleo"] + logged["train/entropy"]
    torch.testing.assert_close(logged["train/loss"], total)
    assert -0.5 * torch.tensor(8.0).log() <= logged["train/entropy"] < 0
