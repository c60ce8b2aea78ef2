"""How a student and its teacher begin."""

import math

import torch
from torch import nn


@torch.no_grad()
def start_equal(student: nn.Module, teacher: nn.Module) -> None:
    """The teacher begins as a copy of the student, its buffers too."""
    teacher.load_state_dict(student.state_dict())


class StartNear:
    """The student begins near a teacher that has random weights of its own.

    The student's parameters, as they were drawn, move towards the teacher's and are scaled so that their variance
    stays. The scaling also lengthens what is constant in both, such as the gains of norms: by 1.4 halfway, by 1e-10 at
    the paper's locality. Buffers stay the student's.

    Args:
        locality: a, from 0 (a copy of the teacher) to 1 (as the student was drawn).

    Source: random teachers (ICML 2023), section 4.
    """

    def __init__(self, locality: float = 0.0) -> None:
        if not 0 <= locality <= 1:
            raise ValueError(f"`locality` must lie in [0, 1], got {locality}.")
        self.locality = locality

    def __call__(self, student: nn.Module, teacher: nn.Module) -> None:
        """Move the student, in place."""
        scale = math.hypot(self.locality, 1 - self.locality)
        mix_parameters(student, teacher, self.locality / scale, (1 - self.locality) / scale)


@torch.no_grad()
def mix_parameters(student: nn.Module, teacher: nn.Module, of_student: float, of_teacher: float) -> None:
    """student <- of_student * student + of_teacher * teacher, over parameters only."""
    for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
        ours.mul_(of_student).add_(theirs, alpha=of_teacher)
