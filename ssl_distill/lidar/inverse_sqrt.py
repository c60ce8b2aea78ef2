"""The learning rate of ScaLR+, as a function of the optimiser step."""

import math
from dataclasses import dataclass, replace

from ssl_distill.optim.schedules import Position


@dataclass(frozen=True)
class InverseSqrt:
    """Linear from 0 to `start`, then 1 / sqrt(1 + time / timescale), then a line to 0.

    Attributes:
        start: Value after warm-up.
        warmup_epochs: Length of the warm-up.
        timescale_epochs: Time in which the value falls to 0.71 of the peak.
        cooldown_epochs: Length of the line at the end.
        joined: Whether the line begins where the curve has come to. The published code lets it begin about 1 % lower.

    Source: ScaLR+, by its published code.
    """

    start: float
    warmup_epochs: float = 1.0
    timescale_epochs: float = 0.45
    cooldown_epochs: float = 2.0
    joined: bool = True

    def __post_init__(self) -> None:
        """Refuse negative lengths, and a timescale of 0."""
        for name in ("warmup_epochs", "cooldown_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if self.timescale_epochs <= 0:
            raise ValueError(f"`timescale_epochs` must be positive, got {self.timescale_epochs}.")

    def at(self, position: Position) -> float:
        """Value for the optimiser step that comes next at `position`."""
        step, warmup_steps = position.step, position.steps(self.warmup_epochs)
        cooldown_steps = min(position.steps(self.cooldown_epochs), position.total_steps - warmup_steps)
        cooldown_start = position.total_steps - cooldown_steps
        timescale = self.timescale_epochs * position.steps_per_epoch
        if step < warmup_steps:
            return self.start * step / warmup_steps
        if step <= cooldown_start or cooldown_steps < 2:
            return self.start / math.sqrt(1 + (step - warmup_steps) / timescale)
        elapsed = cooldown_start - warmup_steps if self.joined else cooldown_start
        left = (position.total_steps - step - 1) / (cooldown_steps - 1)
        return self.start * left / math.sqrt(1 + elapsed / timescale)

    def scaled(self, factor: float) -> "InverseSqrt":
        """The same curve with another peak."""
        return replace(self, start=self.start * factor)
