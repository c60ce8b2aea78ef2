"""Runs that give their machine back when they are asked to."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from ssl_distill.distributed import rank
from ssl_distill.stopping import EXIT_CODES, listen, stop_now

_TOLD = b"\nending after this step, with a checkpoint; Ctrl-C once more ends at once\n"


class Preemption(Checkpoint):
    """Ends a run after the step under way, with `last.ckpt`, on SIGTERM or SIGUSR1 (exit code 75) or Ctrl-C (130).

    `--ckpt_path last` goes on exactly. The signal may reach any rank: all stop after the same step. Before the first
    step and after the last there is nothing to wait for: the run ends at once, with the same code.

    Deviation: Lightning on SLURM saves within the signal handler, in the middle of a step, and with several ranks
    broadcasts there, among whatever collective calls are under way; on Ctrl-C it saves nothing. Its handlers are
    replaced while a run trains.

    Args:
        every_n_steps: How often several ranks ask each other; one rank knows at once.
    """

    # A `Checkpoint`, since Lightning calls those after all other callbacks: the teacher has moved by then.

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be at least 1, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._exit_code = 0  # of the request that has come; 0 for none
        self._steps_seen = 0
        self._group: Any = None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End at once as long as nothing is trained: the first evaluation may take long."""
        listen(stop_now)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, and open a line on which ranks can ask each other without waiting for their devices."""
        listen(self._note)
        self._steps_seen = trainer.global_step
        if trainer.world_size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop, if this batch completed an optimiser step and any rank was asked to."""
        if trainer.global_step in (self._steps_seen, trainer.max_steps):  # what follows the last one is not repeated
            return
        self._steps_seen = trainer.global_step
        if trainer.world_size > 1 and trainer.global_step % self.every_n_steps:
            return
        if code := self._code_of_any_rank(trainer):
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "last.ckpt", weights_only=False)
            raise SystemExit(code)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop where the last evaluation was waited for; from now on, at once."""
        if code := self._code_of_any_rank(trainer):
            raise SystemExit(code)
        listen(stop_now)

    def _code_of_any_rank(self, trainer: Trainer) -> int:
        """The exit code that was asked for; the request is answered with it."""
        code, self._exit_code = self._exit_code, 0
        if trainer.world_size > 1:
            codes = torch.tensor(code)
            dist.all_reduce(codes, dist.ReduceOp.MAX, self._group)
            code = int(codes)
        return code

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._exit_code == EXIT_CODES[signal.SIGINT]:
                stop_now(number, frame)
            if rank() == 0:
                os.write(2, _TOLD)  # a handler must not print: it may have interrupted a `print`
        self._exit_code = EXIT_CODES[signal.Signals(number)]
