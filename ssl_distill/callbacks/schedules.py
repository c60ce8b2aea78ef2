"""How the optimiser's knobs move."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ssl_distill.callbacks.logged_step import is_logged_step
from ssl_distill.optim.schedules import Schedule, check_values, warn_if_warmup_exceeds_run


def global_batch_of(trainer: Trainer) -> int:
    """Images per optimiser step, over all ranks and accumulated batches."""
    loader: Any = trainer.train_dataloader
    size: int = loader.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    return size


class Schedules(Callback):
    """Sets learning rate and weight decay of every group before each batch.

    Groups may carry `lr_scale` (a factor on the rate) and `decayed` (False keeps weight decay at 0).

    Args:
        learning_rate: Rate; its `start` is meant for `reference_batch` images per optimiser step.
        weight_decay: Decay of the decayed groups.
        reference_batch: The rate grows linearly with the global batch over this. None takes the rate as it is.
    """

    def __init__(self, learning_rate: Schedule, weight_decay: Schedule, reference_batch: int | None = 256) -> None:
        if reference_batch is not None and reference_batch < 1:
            raise ValueError(f"`reference_batch` must be at least 1 or null, got {reference_batch}.")
        check_values(0, learning_rate=learning_rate, weight_decay=weight_decay)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.reference_batch = reference_batch
        self._scaled_rate = learning_rate

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Scale the rate to the global batch, and check warm-ups against the length of the run."""
        if self.reference_batch is not None:
            global_batch = global_batch_of(trainer)
            self._scaled_rate = self.learning_rate.scaled(global_batch / self.reference_batch)
            rank_zero_info(
                f"learning rate {self._scaled_rate.start:.3g} = {self.learning_rate.start:.3g}"
                f" * {global_batch} images per step / {self.reference_batch}"
            )
        warn_if_warmup_exceeds_run("learning_rate", self.learning_rate.warmup_epochs, pl_module.position)
        warn_if_warmup_exceeds_run("weight_decay", self.weight_decay.warmup_epochs, pl_module.position)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: object) -> None:
        """Set the values for the coming step."""
        rate = self._scaled_rate.at(pl_module.position)
        decay = self.weight_decay.at(pl_module.position)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
                group["weight_decay"] = decay if group.get("decayed", True) else 0.0
        if is_logged_step(trainer, trainer.global_step + 1):
            pl_module.log_dict({"schedule/learning_rate": rate, "schedule/weight_decay": decay})
