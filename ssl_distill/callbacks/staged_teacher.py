"""Teachers that are replaced by their students, stage by stage."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from ssl_distill.optim.restarts import check_stage_starts, stage_of


def forget(optimizer: Optimizer) -> None:
    """Drop all moments and step counts: those of the old weights say nothing of the new ones."""
    optimizer.state.clear()


def remember(optimizer: Optimizer) -> None:
    """Keep moments and step counts, as dBOT's official code does."""


class StagedTeacher(Callback):
    """Asks the method for its `next_stage()` before the first batch of every stage but the first.

    The method's `stage` says how many switches are done and is part of its checkpoint. A run that is resumed before,
    at or after a switch therefore does exactly those that are missing. Until the switch all that is saved and evaluated
    at the end of an epoch is the stage's own student.

    Args:
        stage_starts: Epochs in which stages begin, the first at 0; the last stage ends with the run.
        restart_optimizer: What becomes of the optimiser at a switch: `forget` or `remember`.

    Source: dBOT (arXiv 2209.03917), section 3.2.
    """

    def __init__(self, stage_starts: Sequence[int], restart_optimizer: Callable[[Optimizer], None] = forget) -> None:
        check_stage_starts(stage_starts)
        self.stage_starts = tuple(stage_starts)
        self.restart_optimizer = restart_optimizer

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse a run with too few epochs before anything is evaluated."""
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            self._check(trainer.max_epochs)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse a run whose steps end before its last stage begins: they are counted only now."""
        position = pl_module.position
        self._check(-(-position.total_steps // position.steps_per_epoch))

    def _check(self, epochs: int) -> None:
        if self.stage_starts[-1] >= epochs:
            count = min(len(self.stage_starts), epochs)
            even = [stage * epochs // count for stage in range(count)]
            raise ValueError(
                f"`stage_starts` must lie before the run's end, which has {epochs} epochs, got"
                f" {list(self.stage_starts)}; try {even}."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Switch if this epoch begins a stage."""
        while pl_module.stage < stage_of(self.stage_starts, trainer.current_epoch):
            pl_module.next_stage()
            for optimizer in trainer.optimizers:
                self.restart_optimizer(optimizer)
            rank_zero_info(f"stage {pl_module.stage}: the student became the teacher and starts from scratch")
