"""Teachers that follow their students."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from ssl_distill.callbacks.logged_step import is_logged_step
from ssl_distill.distributed import local_parts
from ssl_distill.optim.schedules import Cosine


@torch.no_grad()
def ema_update(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, over parameters only.

    Buffers stay the teacher's own: batch-norm statistics come from its own forward passes.
    """
    # Of sharded networks every rank moves its own share: both are divided alike.
    torch._foreach_lerp_(local_parts(teacher.parameters()), local_parts(student.parameters()), 1 - momentum)


class EMATeacher(Callback):
    """Moves each teacher once per optimiser step, right after it, with the momentum of that step.

    Args:
        pairs: (student, teacher) modules with equal parameters.
        momentum: Share of the old teacher in an update.

    Source: DINO (arXiv 2104.14294), section 3.1.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]], momentum: Cosine) -> None:
        self.pairs = pairs
        self.momentum = momentum
        self._steps_seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """A resumed run has done its earlier steps already."""
        self._steps_seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: object) -> None:
        """Update if this batch completed an optimiser step; under accumulation most batches do not."""
        if trainer.global_step == self._steps_seen:
            return
        self._steps_seen = trainer.global_step
        # The step just done is the one before the present position.
        momentum = self.momentum.at(pl_module.position._replace(step=trainer.global_step - 1))
        for student, teacher in self.pairs:
            ema_update(student, teacher, momentum)
        if is_logged_step(trainer, trainer.global_step):
            pl_module.log("schedule/momentum", momentum)
