"""What wandb gets to know of a run besides its metrics."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ssl_distill.reading.settings import read_yaml


class WandbReport(Callback):
    """Sends the run folder's config, evaluations, pictures and backbones to every `WandbLogger` of the trainer.

    The resolved config at the start; after each evaluation the table `evaluation` of all so far; at the end, as
    `pictures/<name>`, those pictures that were not sent on the way, and each `backbone*.safetensors` as an artifact of
    type model. Online and offline are alike. What cannot be sent is told, and ends no run.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the config; a sweep's own values stay beside it under their dotted keys."""
        path = Path(trainer.default_root_dir) / "config.yaml"
        if path.exists():
            config = read_yaml(path)
            _send(trainer, "config", lambda run: run.experiment.config.update(config, allow_val_change=True))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the table of evaluations."""
        path = Path(trainer.default_root_dir) / "evaluation.json"
        if not trainer.is_global_zero or not path.exists():
            return
        rows = [
            {"epoch": entry.get("epoch"), "step": entry.get("step"), "encoder": encoder, **scores}
            for entry in json.loads(path.read_text())
            for encoder, scores in entry["scores"].items()
        ]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[row.get(column) for column in columns] for row in rows]
        _send(trainer, "evaluation", lambda run: run.log_table("evaluation", columns, data))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send pictures and backbones, which are there by now."""
        folder = Path(trainer.default_root_dir)
        for picture in sorted(folder.glob("*.png")):
            _send(trainer, picture.name, partial(_log_picture, path=picture))
        for backbone in sorted(folder.glob("backbone*.safetensors")):
            _send(trainer, backbone.name, partial(_log_model, path=backbone))


def _log_picture(run: WandbLogger, path: Path) -> None:
    key = f"pictures/{path.stem}"
    if key not in run.experiment.summary.keys():  # noqa: SIM118 - those that show how training goes are there already
        run.log_image(key, [str(path)])


def _log_model(run: WandbLogger, path: Path) -> None:
    name = path.stem.replace("_", "-")
    run.experiment.log_artifact(str(path), name=f"{name}-{run.experiment.id}", type="model")


def _send(trainer: Trainer, what: str, send: Callable[[Any], object]) -> None:
    """Send something to every run that the trainer logs to; on the first rank only."""
    if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            try:
                send(logger)
            except Exception as error:
                reason = str(error).partition("\n")[0]
                rank_zero_warn(f"wandb did not take {what} ({type(error).__name__}: {reason}); the run goes on.")
