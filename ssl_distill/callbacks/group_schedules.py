"""Knobs that differ between parameter groups."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ssl_distill.callbacks.logged_step import is_logged_step
from ssl_distill.callbacks.schedules import global_batch_of
from ssl_distill.optim.schedules import Schedule, warn_if_warmup_exceeds_run


class Knobs(NamedTuple):
    """Schedules of one kind of group.

    Attributes:
        learning_rate: Rate per step.
        weight_decay: Decay of the decayed groups.
    """

    learning_rate: Schedule
    weight_decay: Schedule


class GroupSchedules(Callback):
    """Sets learning rate and weight decay of every group by the schedule that its key `schedule` names.

    Groups may carry `lr_scale` and `decayed`, as for `Schedules`.

    Args:
        knobs: By name; logged as `schedule/learning_rate_<name>` and `schedule/weight_decay_<name>`.
        reference_batch: Rates are meant for so many images per step and grow linearly. None takes them as they are.
    """

    def __init__(self, knobs: Mapping[str, Knobs], reference_batch: int | None = 256) -> None:
        if reference_batch is not None and reference_batch < 1:
            raise ValueError(f"`reference_batch` must be at least 1 or null, got {reference_batch}.")
        self.knobs = dict(knobs)
        self.reference_batch = reference_batch
        self._scaled = dict(knobs)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Scale the rates to the global batch, and check warm-ups against the length of the run."""
        if self.reference_batch is not None:
            global_batch = global_batch_of(trainer)
            factor = global_batch / self.reference_batch
            self._scaled = {
                name: knobs._replace(learning_rate=knobs.learning_rate.scaled(factor))
                for name, knobs in self.knobs.items()
            }
            rates = ", ".join(f"{name} {knobs.learning_rate.start:.3g}" for name, knobs in self._scaled.items())
            rank_zero_info(f"learning rates for {global_batch} images per step: {rates}")
        for name, knobs in self.knobs.items():
            for knob, curve in knobs._asdict().items():
                warn_if_warmup_exceeds_run(f"{knob} of {name}", curve.warmup_epochs, pl_module.position)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: object) -> None:
        """Set the values for the coming step."""
        values = {
            name: {knob: curve.at(pl_module.position) for knob, curve in knobs._asdict().items()}
            for name, knobs in self._scaled.items()
        }
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                value = values[group["schedule"]]
                group["lr"] = value["learning_rate"] * group.get("lr_scale", 1.0)
                group["weight_decay"] = value["weight_decay"] if group.get("decayed", True) else 0.0
        if is_logged_step(trainer, trainer.global_step + 1):
            pl_module.log_dict(
                {f"schedule/{knob}_{name}": number for name, value in values.items() for knob, number in value.items()}
            )
