"""Numbers that change during training, as pure functions of the optimiser step: nothing to checkpoint."""

import math
import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol


class Position(NamedTuple):
    """Where training stands, counted in optimiser steps.

    Attributes:
        step: Optimiser steps done so far.
        total_steps: Optimiser steps of the whole run.
        steps_per_epoch: Optimiser steps per epoch.
    """

    step: int
    total_steps: int
    steps_per_epoch: int

    @property
    def epoch(self) -> int:
        """Whole epochs done so far."""
        return self.step // self.steps_per_epoch

    def steps(self, epochs: float) -> int:
        """Steps in that many epochs, at most the whole run."""
        return min(round(epochs * self.steps_per_epoch), self.total_steps)


class Schedule(Protocol):
    """A curve of the optimiser step with a peak that can be scaled; `Cosine`, `EpochCosine` and `Restarts` are."""

    @property
    def start(self) -> float:
        """Value after warm-up."""

    @property
    def warmup_epochs(self) -> float:
        """Length of the warm-up."""

    def at(self, position: Position) -> float:
        """Value for the optimiser step that comes next at `position`."""

    def scaled(self, factor: float) -> "Schedule":
        """The same curve with another peak."""


def check_values(least: float, most: float = math.inf, above: bool = False, **knobs: object) -> None:
    """Refuse numbers and schedules that leave a range.

    Args:
        least: Smallest value.
        most: Largest value.
        above: Whether `least` itself is refused too.
        **knobs: Numbers, or schedules whose ends are looked at, by the names of the arguments.

    Raises:
        ValueError: If one does.
    """
    for name, knob in knobs.items():
        warms_up = getattr(knob, "warmup_epochs", 0) > 0
        names = ("start", "end", "warmup_from") if warms_up else ("start", "end")
        ends = [knob] if isinstance(knob, (int, float)) else [getattr(knob, end, None) for end in names]
        for value in ends:
            if value is not None and not (least < value <= most or (value == least and not above)):
                rule = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
                rule = f"above {least:g}" if above else rule
                raise ValueError(f"`{name}` must be {rule}, got {value}.")


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up from `warmup_from` to `start`, then half a cosine towards `end`; equal ends make a constant.

    Both ends of the warm-up are reached (with W warm-up steps, step 0 has `warmup_from` and step W - 1 has `start`);
    `end` is approached but never reached, as in the published code.

    Attributes:
        start: Value after warm-up.
        end: Value that the cosine approaches.
        warmup_epochs: Length of the warm-up; longer than the run, it fills the run.
        warmup_from: Value at step 0, if there is a warm-up.

    Source: DINO's official schedule; the cosine is SGDR (arXiv 1608.03983), eq. 5.
    """

    start: float
    end: float
    warmup_epochs: float = 0.0
    warmup_from: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a negative warm-up."""
        if self.warmup_epochs < 0:
            raise ValueError(f"`warmup_epochs` must be at least 0, got {self.warmup_epochs}.")

    def at(self, position: Position) -> float:
        """Value for the optimiser step that comes next at `position`."""
        warmup_steps = position.steps(self.warmup_epochs)
        if position.step < warmup_steps:
            return self.warmup_from + (self.start - self.warmup_from) * position.step / max(warmup_steps - 1, 1)
        done = (position.step - warmup_steps) / max(position.total_steps - warmup_steps, 1)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2

    def scaled(self, factor: float) -> "Cosine":
        """The same curve with another peak. `end` and `warmup_from` stay: they are floors, not rates per batch."""
        return replace(self, start=self.start * factor)


@dataclass(frozen=True)
class EpochCosine:
    """Linear from exactly 0 to `start` over the warm-up, then half a cosine to `end`, over fractional epochs.

    Unlike `Cosine`, the warm-up need not be a whole number of steps, and its end belongs to the cosine: after w of W
    warm-up epochs the value is w / W of the peak.

    Attributes:
        start: Value after warm-up.
        end: Value that the cosine approaches.
        warmup_epochs: Length of the warm-up; longer than the run, it fills the run.

    Source: the learning rate in the official code of MAE, MoCo v3, dBOT and PCD.
    """

    start: float
    end: float = 0.0
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a negative warm-up."""
        if self.warmup_epochs < 0:
            raise ValueError(f"`warmup_epochs` must be at least 0, got {self.warmup_epochs}.")

    def value(self, epoch: float, num_epochs: float) -> float:
        """Value after `epoch` of `num_epochs` epochs, both fractional."""
        warmup_epochs = min(self.warmup_epochs, num_epochs)
        if epoch < warmup_epochs:
            return self.start * epoch / warmup_epochs
        done = (epoch - warmup_epochs) / max(num_epochs - warmup_epochs, 1e-12)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    def at(self, position: Position) -> float:
        """Value for the optimiser step that comes next at `position`."""
        return self.value(position.step / position.steps_per_epoch, position.total_steps / position.steps_per_epoch)

    def scaled(self, factor: float) -> "EpochCosine":
        """The same curve with another peak; `end` is a floor and stays."""
        return replace(self, start=self.start * factor)


@dataclass(frozen=True)
class EpochRamp:
    """Linear from `start` to `end` over `epochs` epochs, in one step per epoch, then constant.

    Attributes:
        start: Value in epoch 0, if there is a ramp.
        end: Value from the ramp's last epoch on.
        epochs: Length of the ramp; 0 is constantly `end`. Longer than the run, it is squeezed into the run.
        wait: Epochs at `start` before the ramp, such as those in which no patch is masked yet; shortened to leave the
            run room for the ramp.

    Source: the teacher temperature of DINO (arXiv 2104.14294, section 3.1) and, with `wait`, that of iBOT's patches, in
    their official code.
    """

    start: float
    end: float
    epochs: int = 0
    wait: int = 0

    def at(self, position: Position) -> float:
        """Value at `position`."""
        run_epochs = math.ceil(position.total_steps / position.steps_per_epoch)
        epochs = min(self.epochs, run_epochs)
        epoch = position.epoch - min(self.wait, run_epochs - epochs)
        if epoch >= epochs:
            return self.end
        return self.start + (self.end - self.start) * max(epoch, 0) / max(epochs - 1, 1)


def warn_if_warmup_exceeds_run(name: str, warmup_epochs: float, position: Position) -> None:
    """Say that a warm-up was cut to the length of the run, which then never leaves it."""
    run_epochs = position.total_steps / position.steps_per_epoch
    if warmup_epochs > run_epochs:
        warnings.warn(
            f"`{name}` warms up for {warmup_epochs:g} epochs but the run has {run_epochs:g}: the warm-up is cut to the"
            f" run. Lower its warm-up, or raise `trainer.max_epochs`.",
            stacklevel=2,
        )
