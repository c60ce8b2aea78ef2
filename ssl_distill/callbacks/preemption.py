"""Runs that give their machine back when they are asked to."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

_SIGNALS = ("SIGTERM", "SIGUSR1")  # SLURM, containers and spot machines; SLURM's warning before its time limit


class Preemption(Checkpoint):
    """Ends a run on SIGTERM or SIGUSR1 after the step under way, with `last.ckpt` and an exit code of its own.

    `--ckpt_path last` goes on exactly. The signal may reach any rank: all stop after the same step.

    Deviation: Lightning on SLURM saves within the signal handler, in the middle of a step, and with several ranks
    broadcasts there, among whatever collective calls are under way. Its handlers are replaced while a run trains.

    Args:
        exit_code: 75 is what mail systems and schedulers know as "try again later"; see configs/trainer/slurm.sbatch.
        every_n_steps: How often several ranks ask each other; one rank knows at once.
    """

    # A `Checkpoint`, since Lightning calls those after all other callbacks: the teacher has moved by then.

    def __init__(self, exit_code: int = 75, every_n_steps: int = 10) -> None:
        if not 1 <= exit_code <= 255:
            raise ValueError(f"`exit_code` must be from 1 to 255, got {exit_code}.")
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be at least 1, got {every_n_steps}.")
        self.exit_code = exit_code
        self.every_n_steps = every_n_steps
        self._asked = False
        self._steps_seen = 0
        self._group: Any = None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from the first evaluation on, which may take long."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, and open a line on which ranks can ask each other without waiting for their devices."""
        self._listen()
        self._steps_seen = trainer.global_step
        if trainer.world_size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop, if this batch completed an optimiser step and any rank was asked to."""
        if trainer.global_step == self._steps_seen:
            return
        self._steps_seen = trainer.global_step
        if not self._any_rank_was_asked(trainer):
            return
        self._asked = False
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "last.ckpt", weights_only=False)
        raise SystemExit(self.exit_code)

    def _any_rank_was_asked(self, trainer: Trainer) -> bool:
        if trainer.world_size == 1:
            return self._asked
        if trainer.global_step % self.every_n_steps:
            return False
        asked = torch.tensor(int(self._asked))
        dist.all_reduce(asked, dist.ReduceOp.MAX, self._group)
        return bool(asked)

    def _listen(self) -> None:
        """Take over the signals; Lightning gives them back to whom they belonged before the run."""
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    signal.signal(getattr(signal, name), self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
