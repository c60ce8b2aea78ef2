"""Teachers that stay as they are."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import nn

from ssl_distill.optim.schedules import Cosine


class FrozenTeacher(Callback):
    """Never updates the teachers, and keeps them in eval mode: their batch norms are fixed maps.

    Args:
        pairs: (student, teacher) modules.
        momentum: Unused; everything that teachers live by is made from it.

    Source: random teachers (ICML 2023), section 3.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]], momentum: Cosine | None = None) -> None:
        self.teachers = [teacher for _, teacher in pairs]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: object) -> None:
        """Before every batch: whoever calls `train()` on the whole method means the student."""
        for teacher in self.teachers:
            teacher.eval()
