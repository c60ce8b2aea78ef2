"""Which steps reach the loggers."""

from typing import Any


def is_logged_step(trainer: Any, number: int) -> bool:
    """Whether the `number`-th optimiser step, from 1, is one that loggers get: logging any other is lost time.

    `Trainer.log_every_n_steps` decides; 0 logs nothing.
    """
    interval: int = trainer.log_every_n_steps
    return interval > 0 and number % interval == 0
