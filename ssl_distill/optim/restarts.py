"""Learning rates over fractional epochs, restarted at every stage."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ssl_distill.optim.schedules import EpochCosine, Position


@dataclass(frozen=True)
class Restarts:
    """The same curve anew in every stage, each as long as the stage.

    Attributes:
        curve: What is restarted.
        stage_starts: Epochs in which stages begin, the first at 0; the last stage ends with the run.

    Source: dBOT (arXiv 2209.03917), its official code.
    """

    curve: EpochCosine
    stage_starts: Sequence[int]

    def __post_init__(self) -> None:
        """Refuse stages that are none, or that end before their warm-up."""
        check_stage_starts(self.stage_starts)
        lengths = [end - start for start, end in pairwise(self.stage_starts)]
        if lengths and self.curve.warmup_epochs >= min(lengths):
            raise ValueError(
                f"`warmup_epochs` must be below the length of every stage, the shortest has {min(lengths)} epochs, got"
                f" {self.curve.warmup_epochs:g}."
            )

    @property
    def start(self) -> float:
        """Value after each warm-up."""
        return self.curve.start

    @property
    def warmup_epochs(self) -> float:
        """Length of each warm-up."""
        return self.curve.warmup_epochs

    def value(self, epoch: float, num_epochs: float) -> float:
        """Value after `epoch` of `num_epochs` epochs, both fractional."""
        stage = stage_of(self.stage_starts, epoch)
        first = self.stage_starts[stage]
        end = self.stage_starts[stage + 1] if stage + 1 < len(self.stage_starts) else num_epochs
        return self.curve.value(epoch - first, end - first)

    def at(self, position: Position) -> float:
        """Value for the optimiser step that comes next at `position`."""
        return self.value(position.step / position.steps_per_epoch, position.total_steps / position.steps_per_epoch)

    def scaled(self, factor: float) -> "Restarts":
        """The same curves with another peak."""
        return replace(self, curve=self.curve.scaled(factor))


def stage_of(stage_starts: Sequence[int], epoch: float) -> int:
    """Number of the stage, from 0, that an epoch belongs to."""
    return bisect.bisect_right(stage_starts, epoch) - 1


def check_stage_starts(stage_starts: Sequence[int]) -> None:
    """Refuse starts that do not begin at 0 or do not grow."""
    if not stage_starts or stage_starts[0] != 0 or any(a >= b for a, b in pairwise(stage_starts)):
        raise ValueError(
            f"`stage_starts` must be growing epochs from 0 on, such as [0, 800], got {list(stage_starts)}."
        )
