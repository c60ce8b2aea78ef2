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
