"""Which earlier trials a new one starts from and is distilled by."""

import random
from collections.abc import Sequence
from typing import NamedTuple

SCRATCH_TRIALS = 2  # before there is anything to choose from
BEST = 3


class Elders(NamedTuple):
    """Earlier trials by number.

    Attributes:
        student: Whose student is the first one of the new trial.
        teacher: Whose teacher is its first teacher.
    """

    student: int
    teacher: int


def choose_elders(best_first: Sequence[int], seed: int) -> Elders | None:
    """Two different ones of the best trials, drawn; None while there are too few.

    Args:
        best_first: Numbers of finished trials.
        seed: A number per trial.

    Source: BOSS (arXiv 2304.12666) by its abstract: Bayesian optimisation proposes hyper-parameters, and models of
    earlier trials are chosen for self-distillation. How many, and which serves as what, is our choice.
    """
    if len(best_first) < SCRATCH_TRIALS:
        return None
    student, teacher = random.Random(seed).sample(list(best_first[:BEST]), 2)
    return Elders(student, teacher)
