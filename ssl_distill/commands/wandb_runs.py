"""Runs that log to wandb where there is no wandb, no account or no network."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

_TIMEOUT_S = "30"  # for the server's first answer; wandb's own is 90


def without_missing_wandb(loggers: Sequence[Any]) -> list[Any]:
    """Configured loggers, without wandb's where it is not installed: `metrics.csv` has the same numbers."""
    if importlib.util.find_spec("wandb"):
        return list(loggers)
    kept = [each for each in loggers if not (isinstance(each, Namespace) and "Wandb" in each.get("class_path", ""))]
    if len(kept) < len(loggers):
        rank_zero_warn("`trainer.logger` is WandbLogger, but wandb is not installed: logging to the run folder only.")
    return kept


def open_runs(loggers: Sequence[Any]) -> list[Any]:
    """Loggers whose wandb runs are open: offline, if the server cannot be reached or does not know us."""
    return [each for each in loggers if not isinstance(each, WandbLogger) or _is_open(each)]


def _is_open(logger: WandbLogger) -> bool:
    os.environ.setdefault("WANDB_INIT_TIMEOUT", _TIMEOUT_S)
    for then in ("logging offline; `wandb sync` sends it later", "not logging there"):
        try:
            logger.experiment  # noqa: B018 - made when first asked for
            return True
        except Exception as error:
            rank_zero_warn(f"wandb cannot be used as it is ({' '.join(str(error).split())}): {then}.")
            _go_offline()
    return False


def _go_offline() -> None:
    import wandb

    os.environ["WANDB_MODE"] = "offline"
    wandb.teardown()  # which has read its environment already
