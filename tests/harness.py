"""What tests of training share: views that come stored, a quiet trainer, crashes, several ranks."""

import os
import socket

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import multiprocessing, nn

from ssl_distill.optim.schedules import Cosine, EpochRamp


class StoredViews(nn.Module):
    """In place of an augmentation: batches are views already."""

    mean, std = (0.0,) * 3, (1.0,) * 3

    def __init__(self, global_size=32):
        super().__init__()
        self.global_size = global_size

    def forward(self, batch, draws):
        return batch


class PerStep(Cosine, EpochRamp):
    """Stored values in place of a schedule."""

    warmup_epochs = 0.0

    def __init__(self, values):
        Cosine.__init__(self, values[0], values[-1])
        object.__setattr__(self, "values", values)

    def at(self, position):
        return self.values[position.step]


def in_float64(case):
    """Tensors of a golden case as they were computed."""
    return {key: value.double() if value.is_floating_point() else value for key, value in case.tensors.items()}


def quiet_trainer(folder, callbacks=(), ranks=1, **kwargs):
    """On CPU, with nothing printed or logged, no validation, and checkpoints only by a callback that makes them."""
    options = {
        "accelerator": "cpu",
        "devices": ranks,
        "strategy": DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
        "logger": False,
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return Trainer(callbacks=list(callbacks), **{**options, **kwargs})


class Crash(Exception):
    """The machine went down."""


class StopAt(Callback):
    """Ends a run in the middle of a step's work."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Crash


def save_every_step(folder):
    return ModelCheckpoint(folder, "last", every_n_train_steps=1, enable_version_counter=False)


def on_ranks(function, *args, ranks=2):
    """Call function(rank, *args) in processes that find each other; an error in one is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_on_rank, (function, ranks, port, args), nprocs=ranks)


def _on_rank(rank, function, ranks, port, args):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", WORLD_SIZE=str(ranks))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    function(rank, *args)
