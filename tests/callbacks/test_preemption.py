"""Runs that are asked to stop, stop soon, and go on as if nothing had happened."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import multiprocessing

from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.callbacks.preemption import Preemption
from ssl_distill.data.shapes import ShapesData
from ssl_distill.heads.prototype import PrototypeHead
from ssl_distill.methods.dino import DINO
from ssl_distill.optim.schedules import Cosine

ROOT = Path(__file__).parents[2]


def head(in_dim, num_prototypes):
    return PrototypeHead(in_dim, num_prototypes, hidden_dim=16, bottleneck_dim=8)


class AskAt(Callback):
    """Another process wants the machine."""

    def __init__(self, step, number, rank=0, ask=os.kill):
        self.step = step
        self.number = number
        self.rank = rank
        self.ask = ask

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
            self.ask(os.getpid(), self.number)


def fit(folder, *callbacks, ranks=1, every_n_steps=1, num_workers=0, **kwargs):
    pl.seed_everything(0, verbose=False)
    augment = MultiCropAugment(global_size=32, num_local=0)
    rate = Cosine(1e-3, 1e-5)
    method = DINO("vit_nano_patch8_32", num_prototypes=16, head=head, augment=augment, learning_rate=rate)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*callbacks, Preemption(every_n_steps=every_n_steps)],
        max_epochs=2,
        limit_val_batches=0,
        log_every_n_steps=1,
        **kwargs,
    )
    ckpt_path = folder / "last.ckpt" if (folder / "last.ckpt").exists() else None
    trainer.fit(method, ShapesData(num_images=24, batch_size=8 // ranks, num_workers=num_workers), ckpt_path=ckpt_path)
    return method.state_dict()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(("accumulate", "step"), [(1, 1), (1, 2), (3, 0)])
def test_stops_and_goes_on_exactly(number, accumulate, step, tmp_path):
    """In mid-epoch, at its end, and when gradients of one batch of three are there."""
    before = signal.getsignal(number)
    expected = fit(tmp_path / "whole", accumulate_grad_batches=accumulate)
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path / "asked", AskAt(step, number), accumulate_grad_batches=accumulate)
    assert stopped.value.code == 75
    assert signal.getsignal(number) == before
    checkpoint = torch.load(tmp_path / "asked" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == step + 1
    resumed = fit(tmp_path / "asked", accumulate_grad_batches=accumulate)
    assert all(torch.equal(value, resumed[key]) for key, value in expected.items())


def run_rank(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ["WORLD_SIZE"] = "2"
    try:
        fit(folder, AskAt(1, signal.SIGTERM, rank=1), ranks=2, every_n_steps=2)
    except SystemExit as stopped:
        (folder / f"rank{rank}").write_text(str(stopped.code))


@pytest.mark.ddp
def test_ranks(tmp_path):
    """One rank is asked; both stop after the next step at which they ask each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(run_rank, (port, tmp_path), nprocs=2)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["75", "75"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def ask_group(group, number):
    """From a process of its own, as a scheduler does: loader processes obey their parent."""
    subprocess.run(["kill", f"-{int(number)}", "--", f"-{group}"], check=True, start_new_session=True)


def run_in_group(_, folder, number):
    torch.set_num_threads(1)
    os.setsid()
    try:
        fit(folder, AskAt(1, number, ask=ask_group), num_workers=2)
    except SystemExit as stopped:
        (folder / "code").write_text(str(stopped.code))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_schedulers_signal_loader_processes_too(number, tmp_path):
    multiprocessing.spawn(run_in_group, (tmp_path, number), nprocs=1)
    assert (tmp_path / "code").read_text() == "75"
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize(("code", "queued"), [(0, False), (1, False), (75, True)])
def test_slurm_script(code, queued, tmp_path):
    """With stand-ins for SLURM's commands: what is run, what is queued again, and that the next job resumes."""
    for name, lines in {"srun": f'echo "$@"; exit {code}', "scontrol": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    command = ["bash", str(ROOT / "configs/trainer/slurm.sbatch"), str(tmp_path / "run"), "-c", "a b.yaml"]
    first = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert first.returncode == code
    assert f"ssl-distill fit -c a b.yaml --trainer.default_root_dir {tmp_path}/run\n" in first.stdout
    assert ("requeue 7" in first.stdout) == queued
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").touch()
    (tmp_path / "run" / "run.lock").touch()
    second = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (tmp_path / "run" / "run.lock").exists()
    subprocess.run(command, capture_output=True, env=environment | {"SLURM_RESTART_COUNT": "1"})
    assert not (tmp_path / "run" / "run.lock").exists()
    assert f"--trainer.default_root_dir {tmp_path}/run --ckpt_path last\n" in second.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be at least 1, got 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Preemption(**options)
