"""Teachers that follow their students."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from ssl_distill.callbacks.logged_step import is_logged_step
from ssl_distill.distributed import local_parts
from ssl_distill.optim.schedules import Cosine, check_values
from ssl_distill.sharding import divided_like, whole


@torch.no_grad()
def ema_update(
    student: nn.Module, teacher: nn.Module, momentum: float, running: Sequence[Tensor] | None = None
) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, over parameters only.

    Buffers stay the teacher's own: batch-norm statistics come from its own forward passes.

    Args:
        student: Has the same parameters as the teacher.
        teacher: Moved in place.
        momentum: Share of the old teacher.
        running: The teacher's parameters in float32, which are moved and then rounded to the teacher's; None moves the
            teacher's own.
    """
    # Of sharded networks every rank moves its own share: both are divided alike.
    students, teachers = local_parts(student.parameters()), local_parts(teacher.parameters())
    if running is None:
        torch._foreach_lerp_(teachers, students, 1 - momentum)
    else:
        values = local_parts(running)
        torch._foreach_lerp_(values, [part.float() for part in students], 1 - momentum)
        torch._foreach_copy_(teachers, values)


class EMATeacher(Callback):
    """Moves each teacher once per optimiser step, right after it, with the momentum of that step.

    The running value of a teacher in half precision (`trainer.precision` bf16-true, 16-true) is kept in float32, here
    and in checkpoints: its steps are smaller than what half precision can tell from nothing.

    Args:
        pairs: (student, teacher) modules with equal parameters.
        momentum: Share of the old teacher in an update.

    Source: DINO (arXiv 2104.14294), section 3.1.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]], momentum: Cosine) -> None:
        check_values(0, 1, momentum=momentum)
        self.pairs = pairs
        self.momentum = momentum
        self._running: list[list[Tensor] | None] = [None for _ in pairs]
        self._restored: list[list[Tensor] | None] = [None for _ in pairs]

    def state_dict(self) -> dict[str, Any]:
        """Running values of teachers in half precision, whole and on the CPU; to be called on all ranks."""
        kept = [running and [whole(value).cpu() for value in running] for running in self._running]
        return {"running": kept} if any(kept) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the running values of a checkpoint."""
        self._restored = state_dict["running"]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """A resumed run has done its earlier steps already."""
        self._steps_seen = trainer.global_step
        for i, (_, teacher) in enumerate(self.pairs):
            parameters = [parameter.detach() for parameter in teacher.parameters()]
            if all(torch.finfo(parameter.dtype).bits >= 32 for parameter in parameters):
                continue
            restored: Sequence[Tensor | None] = self._restored[i] or [None] * len(parameters)
            self._running[i] = [
                parameter.float() if value is None else divided_like(parameter, value.to(parameter.device, copy=True))
                for parameter, value in zip(parameters, restored, strict=True)
            ]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: object) -> None:
        """Update if this batch completed an optimiser step; under accumulation most batches do not."""
        if trainer.global_step == self._steps_seen:
            return
        self._steps_seen = trainer.global_step
        # The step just done is the one before the present position.
        momentum = self.momentum.at(pl_module.position._replace(step=trainer.global_step - 1))
        for (student, teacher), running in zip(self.pairs, self._running, strict=True):
            ema_update(student, teacher, momentum, running)
        if is_logged_step(trainer, trainer.global_step):
            pl_module.log("schedule/momentum", momentum)
