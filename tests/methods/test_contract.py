"""What every method promises, asked the same way of each."""

import os
import socket
from collections.abc import Callable
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from small_methods import separate_token_head, small_crops, small_dino, small_ibot, small_odis, small_udi
from torch import multiprocessing

from ssl_distill.augment.object_crop import ObjectCropAugment
from ssl_distill.callbacks.ema_teacher import EMATeacher
from ssl_distill.data.shapes import ShapesData
from ssl_distill.losses.object_view import mean_over_images
from ssl_distill.methods.base import Distiller
from ssl_distill.optim.schedules import Cosine

GLOBAL_BATCH = 8


METHODS: dict[str, Callable[[], Distiller]] = {
    "dino": small_dino,
    "ibot": partial(small_ibot, head=separate_token_head),
    # Ranks have different numbers of scenes without an object; the default average is meant per rank.
    "odis": partial(
        small_odis,
        augment=ObjectCropAugment(small_crops(), patch_size=8, min_area=0.05, missing="skip"),
        average=mean_over_images,
    ),
    "udi": small_udi,
}
ON_SCENES = ("odis",)
STOPS = {1: (1, 4, 7), 2: (1,)}  # accumulated batches: steps before which the machine goes down, of 8 and of 4


def small_data(name, ranks=1):
    size = {"num_images": 4 * GLOBAL_BATCH + 3, "bank_size": 20, "query_size": 10}
    return ShapesData("scene" if name in ON_SCENES else "single", batch_size=GLOBAL_BATCH // ranks, **size)


def trainer_for(folder, callbacks=(), ranks=1, **kwargs):
    options = {"max_epochs": 2, "log_every_n_steps": 1, "limit_val_batches": 0, **kwargs}
    return Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )


def fit(name, folder, callbacks=(), ranks=1, ckpt_path=None, drop_path=True, **kwargs):
    pl.seed_everything(0, verbose=False)
    method = METHODS[name]()
    if not drop_path:
        for module in method.modules():
            if type(module).__name__ == "DropPath":
                module.drop_prob = 0.0
    trainer_for(folder, callbacks, ranks, **kwargs).fit(method, small_data(name, ranks), ckpt_path=ckpt_path)
    return method


@pytest.mark.parametrize("name", METHODS)
def test_training_stays_finite_and_moves_only_students(name, tmp_path):
    gradients = {}

    class Recorder(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients.update({key: p.grad for key, p in pl_module.named_parameters() if p.grad is not None})
            assert all(grad.isfinite().all() for grad in gradients.values())

    method = fit(name, tmp_path, [Recorder()])
    assert all(value.isfinite().all() for value in method.state_dict().values())
    assert gradients
    trainable = {key for key, parameter in method.named_parameters() if parameter.requires_grad}
    assert set(gradients) == trainable
    assert not any(key.startswith("teacher") for key in trainable)
    assert method.monitor()
    assert all(value.isfinite() for value in method.monitor().values())


@pytest.mark.parametrize("name", METHODS)
def test_teacher_obeys_its_law(name, tmp_path):
    """The moving average, recomputed from the students of every step."""
    students, expected = [], []

    class Recorder(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if not expected:
                expected.extend(parameter.clone() for parameter in pl_module.teacher.parameters())

        def on_train_batch_end(self, trainer, pl_module, *args):
            momentum = pl_module.momentum.at(pl_module.position._replace(step=trainer.global_step - 1))
            for value, student in zip(expected, pl_module.student.parameters(), strict=True):
                value.mul_(momentum).add_(student.detach(), alpha=1 - momentum)
            students.append(momentum)

    method = fit(name, tmp_path, [Recorder()])
    assert any(isinstance(callback, EMATeacher) for callback in method.configure_callbacks())
    assert len(students) == 8
    torch.testing.assert_close(list(method.teacher.parameters()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", STOPS)
@pytest.mark.parametrize("name", METHODS)
def test_resume_is_bit_equal(name, accumulate, tmp_path):
    """Stopped in mid-epoch, at its end and in the second epoch; resumed from the step before."""
    whole = fit(name, tmp_path, accumulate_grad_batches=accumulate).state_dict()
    for stop in STOPS[accumulate]:
        folder = tmp_path / str(stop)
        options = {"folder": folder, "accumulate_grad_batches": accumulate}
        with pytest.raises(Crash):
            fit(name, callbacks=[save_every_step(folder), StopAt(stop)], **options)
        options["ckpt_path"] = folder / "last.ckpt"
        resumed = fit(name, callbacks=[save_every_step(folder)], **options).state_dict()
        different = [key for key, value in whole.items() if not torch.equal(value, resumed[key])]
        assert not different, f"stopped after step {stop}: {different[:3]}"


def teacher_step(name, precision, folder):
    """How far the teacher went towards where its student is, and the dtypes of its centers."""
    pl.seed_everything(0, verbose=False)
    method = METHODS[name](momentum=Cosine(0.996, 0.996), learning_rate=Cosine(2e-3, 2e-3), freeze_last_layer_epochs=0)
    networks = {"student": method.student, "teacher": method.teacher}
    start = {key: value.detach().bfloat16().float() for key, value in method.teacher.named_parameters()}
    trainer_for(folder, precision=precision, max_epochs=6).fit(method, small_data(name))
    student, teacher = (
        torch.cat([(dict(network.named_parameters())[key].detach().float() - start[key]).flatten() for key in start])
        for network in networks.values()
    )
    centers = [value.dtype for key, value in method.state_dict().items() if "center" in key or key == "targets.value"]
    return float(teacher @ student / student.norm()), centers


@pytest.mark.parametrize("name", METHODS)
def test_teacher_in_half_precision_does_not_stall(name, tmp_path):
    """Its steps are below what bfloat16 resolves: without a running value in float32 it would stand still."""
    expected, _ = teacher_step(name, "32-true", tmp_path)
    moved, centers = teacher_step(name, "bf16-true", tmp_path)
    assert moved == pytest.approx(expected, rel=0.05)
    assert centers
    assert set(centers) == {torch.float32}


def test_resume_in_half_precision_is_bit_equal(tmp_path):
    whole = fit("dino", tmp_path, precision="bf16-true").state_dict()
    with pytest.raises(Crash):
        fit("dino", tmp_path, [save_every_step(tmp_path), StopAt(4)], precision="bf16-true")
    checkpoint = tmp_path / "last.ckpt"
    running = torch.load(checkpoint, weights_only=True)["callbacks"]["EMATeacher"]["running"][0]
    assert {value.dtype for value in running} == {torch.float32}
    resumed = fit("dino", tmp_path, [save_every_step(tmp_path)], precision="bf16-true", ckpt_path=checkpoint)
    different = [key for key, value in resumed.state_dict().items() if not torch.equal(value, whole[key])]
    assert not different


def save_every_step(folder):
    return ModelCheckpoint(folder, "last", every_n_train_steps=1, enable_version_counter=False)


class Crash(Exception):
    """The machine went down."""


class StopAt(pl.Callback):
    """Ends a run in the middle of a step's work."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Crash


IN_FLOAT64 = {"drop_path": False, "max_steps": 4, "precision": "64-true"}  # AdamW blows rounding up to whole steps


def run_rank(rank, world, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ["WORLD_SIZE"] = str(world)
    for name in METHODS:
        method = fit(name, folder, ranks=world, **IN_FLOAT64)
        torch.save(method.state_dict(), folder / f"{name}_{rank}.pt")


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """Weights of every method and rank; started once, because starting takes longest."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(run_rank, (2, port, folder), nprocs=2)
    return {name: [torch.load(folder / f"{name}_{rank}.pt") for rank in range(2)] for name in METHODS}


@pytest.mark.ddp
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_equal_one(name, on_two_ranks, tmp_path):
    one = fit(name, tmp_path, **IN_FLOAT64).state_dict()
    first, second = on_two_ranks[name]
    for key, value in one.items():
        torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
        assert torch.equal(first[key], second[key]), key
