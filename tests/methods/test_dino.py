from functools import partial

import pytest
import torch
from harness import StoredViews, quiet_trainer
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ssl_distill.backbones.create import create_backbone
from ssl_distill.heads.prototype import FreePrototypes, PrototypeHead, UnitPrototypes
from ssl_distill.methods.dino import DINO
from ssl_distill.optim.schedules import Cosine, EpochRamp
from ssl_distill.targets.center import Center
from ssl_distill.views import MultiCrop


class StepsOfEpoch(Sampler):
    """Steps epoch * n ... epoch * n + n - 1, each in `parts`; Lightning tells it the epoch."""

    def __init__(self, steps_per_epoch, parts):
        self.length, self.epoch = steps_per_epoch * parts, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __iter__(self):
        yield from range(self.epoch * self.length, (self.epoch + 1) * self.length)  # lazily: the epoch comes late


class StoredSteps(Dataset):
    """Views of every step of a golden run, each step cut into `parts` micro-batches."""

    def __init__(self, case, parts):
        self.case, self.parts = case, parts

    def __getitem__(self, i):
        step, part = divmod(i, self.parts)
        num_crops = len(self.case.params["crop_sizes"])
        crops = [self.case.tensors[f"step{step}.crop{j}"].chunk(self.parts)[part] for j in range(num_crops)]
        return MultiCrop(torch.stack(crops[:2]), torch.stack(crops[2:]))


class StoredRun(LightningDataModule):
    def __init__(self, case, parts):
        super().__init__()
        self.case, self.parts = case, parts

    def train_dataloader(self):
        sampler = StepsOfEpoch(self.case.params["niter_per_ep"], self.parts)
        return DataLoader(StoredSteps(self.case, self.parts), batch_size=None, sampler=sampler)


class Recorder(Callback):
    """Losses and centers after every optimiser step; stops where the golden run does."""

    def __init__(self, stop_after):
        self.stop_after, self.losses, self.centers, self.rates, self.state_after_epoch = stop_after, [], [], [], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)  # Lightning divides by it
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.centers.append(pl_module.targets.value[0].clone())
            self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        if trainer.global_step == self.stop_after:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer, pl_module):
        state = pl_module.student.state_dict()
        self.state_after_epoch[trainer.current_epoch] = {name: value.clone() for name, value in state.items()}


def golden_dino(case):
    """The method with the hyper-parameters and initial weights of a golden run."""
    params = case.params
    assert params["drop_path"] == 0  # nobody else could draw the same paths
    backbone = create_backbone(
        "vit_small_patch16_224",
        img_size=params["img_size"],
        patch_size=params["patch_size"],
        embed_dim=params["embed_dim"],
        depth=params["depth"],
        num_heads=params["num_heads"],
        mlp_ratio=params["mlp_ratio"],
        position_mode="dino_v1",
    )
    method = DINO(
        backbone=backbone,
        num_prototypes=params["out_dim"],
        head=partial(
            PrototypeHead,
            hidden_dim=params["head_hidden"],
            bottleneck_dim=params["bottleneck"],
            prototypes=UnitPrototypes if params["student_norm_last_layer"] else FreePrototypes,
        ),
        targets=partial(Center, momentum=params["center_momentum"]),
        augment=StoredViews(),
        learning_rate=Cosine(params["lr_base"], params["min_lr"], params["warmup_epochs"]),
        reference_batch=None,
        weight_decay=Cosine(*params["weight_decay"]),
        momentum=Cosine(*params["momentum"]),
        student_temperature=params["student_temp"],
        teacher_temperature=EpochRamp(
            params["warmup_teacher_temp"], params["teacher_temp"], params["warmup_teacher_temp_epochs"]
        ),
        freeze_last_layer_epochs=params["freeze_last_layer_epochs"],
        clip_norm=params["clip_grad"],
    ).double()
    assert {module.eps for module in method.modules() if isinstance(module, nn.LayerNorm)} == {params["ln_eps"]}
    method.student.load_state_dict(case.under("init."))
    method.teacher.load_state_dict(case.under("init."))
    return method


def fit(method, case, folder, parts=1, stop_after=None, ckpt_path=None):
    params = case.params
    recorder = Recorder(stop_after or params["run_epochs"] * params["niter_per_ep"])
    at_epoch_end = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, every_n_epochs=1)
    options = {"max_epochs": params["epochs"], "accumulate_grad_batches": parts, "precision": "64-true"}
    trainer = quiet_trainer(folder, [recorder, at_epoch_end], **options)
    trainer.fit(method, StoredRun(case, parts), ckpt_path=ckpt_path)
    return recorder


def check_end(method, case):
    expect = {"rtol": 1e-6, "atol": 1e-9}
    for name, value in case.under("student.").items():
        torch.testing.assert_close(method.student.state_dict()[name], value, **expect)
    for name, value in case.under("teacher.").items():
        torch.testing.assert_close(method.teacher.state_dict()[name], value, **expect)


def test_golden(golden, tmp_path):
    case = golden("dino/train_run")
    method = golden_dino(case)
    recorder = fit(method, case, tmp_path)
    expect = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(torch.tensor(recorder.losses, dtype=torch.float64), case.tensors["losses"], **expect)
    torch.testing.assert_close(torch.stack(recorder.centers), case.tensors["centers_after"], **expect)
    steps = len(recorder.rates)
    torch.testing.assert_close(
        torch.tensor(recorder.rates, dtype=torch.float64), case.tensors["lr"][:steps, None].expand(-1, 2), **expect
    )
    for name, value in case.under("after_epoch0.student.").items():
        torch.testing.assert_close(recorder.state_after_epoch[0][name], value, **expect)
    check_end(method, case)


def test_golden_with_accumulation(golden, tmp_path):
    """Each stored batch in single images: gradients, centers and teacher move once per step."""
    case = golden("dino/train_run")
    parts = case.params["batch_size"]
    method = golden_dino(case)
    recorder = fit(method, case, tmp_path, parts=parts)
    losses = torch.tensor(recorder.losses, dtype=torch.float64).view(-1, parts).mean(1)
    torch.testing.assert_close(losses, case.tensors["losses"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.stack(recorder.centers), case.tensors["centers_after"], rtol=1e-6, atol=1e-9)
    check_end(method, case)


def test_golden_resumed(golden, tmp_path):
    """Stopped after the first epoch and resumed in a new process's stead: new method, new trainer."""
    case = golden("dino/train_run")
    fit(golden_dino(case), case, tmp_path, stop_after=case.params["niter_per_ep"])
    resumed = golden_dino(case)
    recorder = fit(resumed, case, tmp_path, ckpt_path=tmp_path / "last.ckpt")
    first = case.params["niter_per_ep"]
    expected = case.tensors["losses"][first:]
    torch.testing.assert_close(torch.tensor(recorder.losses, dtype=torch.float64), expected, rtol=1e-6, atol=1e-9)
    check_end(resumed, case)


def test_errors():
    with pytest.raises(ValueError, match=r"`clip_norm` must be at least 0 \(0: no clipping\), got -1"):
        DINO(backbone=nn.Flatten(), clip_norm=-1)
