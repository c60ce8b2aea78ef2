"""What a run leaves behind."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.fsdp import FSDPModule

import ssl_distill
from ssl_distill.callbacks.curves import draw_curves
from ssl_distill.callbacks.views_picture import draw_views, sample_batch
from ssl_distill.export import better_encoder, export_method, loading_lines, models_of
from ssl_distill.reading.tensors import load_tensors
from ssl_distill.sharding import whole_state_dict

_CONTENTS = {
    "last.ckpt": "the end of training, to resume from",
    "best.ckpt": "the best val/score",
    "config.yaml": "the resolved config, to fit or validate again",
    "metrics.csv": "all that was logged",
    "curves.png": "the same as curves",
    "evaluation.json": "every evaluation with its protocol",
    "views.png": "what the network saw",
    "pca.png": "its features as colours, over time",
    "attention.png": "where its class token looked, over time",
    "neighbours.png": "what it held for alike, before and after",
    "birdseye.png": "classes from above, predicted beside true",
    "pairs.png": "points over the picture they are paired with",
    "environment.json": "how the run was started, and on what",
}


class RunFolder(Callback):
    """Leaves pictures, the last checkpoint and the backbone in `trainer.default_root_dir`, and lists them.

    At the start `views.png`; in every checkpoint the method's class path and the latest scores; at the end `last.ckpt`,
    `curves.png` and `backbone.safetensors`, the better encoder at the best `val/score`, or after the last step where
    nothing was judged. Of a method that trains several models it holds the first; each other one has a file named after
    its better encoder. A run that is interrupted keeps the last checkpoint that it had.

    Args:
        picture_rows: Images in `views.png`; 0 for no picture.
    """

    def __init__(self, picture_rows: int = 8) -> None:
        if picture_rows < 0:
            raise ValueError(f"`picture_rows` must be at least 0 (0: no picture), got {picture_rows}.")
        self.picture_rows = picture_rows
        self._scores: dict[str, float] = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Know the scores of the run that is gone on with, until there are newer ones."""
        self._scores = checkpoint.get("ssl_distill", {}).get("scores", {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the network is about to see."""
        if _is_trial(trainer) or not trainer.is_global_zero or not self.picture_rows:
            return
        augment = getattr(pl_module, "augment", None)
        loader: Any = trainer.train_dataloader
        batch = sample_batch(loader, self.picture_rows)
        if hasattr(batch, "image") and hasattr(augment, "mean"):
            draw_views(batch, augment, _folder(trainer) / "views.png", pl_module.device)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say whose checkpoint it is and what it scored; what was logged before it is on the disk before it is."""
        _log_row_under_way(trainer)
        checkpoint["ssl_distill"] = {
            "method": f"{type(pl_module).__module__}.{type(pl_module).__qualname__}",
            "version": ssl_distill.__version__,
            "scores": self._latest_scores(trainer),
        }

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training; the last periodic checkpoint is a little older."""
        if trainer.checkpoint_callback is not None and not _is_trial(trainer):
            trainer.save_checkpoint(_folder(trainer) / "last.ckpt", weights_only=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, draw and list what there is."""
        if _is_trial(trainer):
            return
        # Order matters: weights that are sharded are put together by all ranks.
        weights = whole_state_dict(pl_module) if isinstance(pl_module, FSDPModule) else None
        if not trainer.is_global_zero:
            return
        folder = _folder(trainer)
        draw_curves(folder / "metrics.csv", folder / "curves.png")
        lines = [f"\n{folder} holds"]
        lines += [f"  {name:<22}  {text}" for name, text in _CONTENTS.items() if (folder / name).exists()]
        if hasattr(pl_module, "encoders"):
            best = _best_checkpoint(trainer, pl_module)
            lines += _export(pl_module, folder, best, self._latest_scores(trainer), weights)
        trainer.print("\n".join(lines))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how to go on, if the run was stopped from outside (Ctrl-C, SIGTERM)."""
        if trainer.state.fn != TrainerFn.FITTING or isinstance(exception, Exception):
            return
        last = _folder(trainer) / "last.ckpt"
        trainer.print(
            f"Stopped. The same command with --ckpt_path last goes on from {last}."
            if last.exists()
            else "Stopped before the first checkpoint. The same command begins again."
        )

    def _latest_scores(self, trainer: Trainer) -> dict[str, float]:
        logged = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        return logged or self._scores


def _log_row_under_way(trainer: Trainer) -> None:
    """Log the step that has just been made.

    A resumed run logs from the checkpoint's step on, and Lightning logs a step after the callbacks that save it: a run
    that ended in between would lack that row. `MetricsFile` drops the row when it comes again.
    """
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    if trainer.training and batches.current.completed < batches.current.processed:
        trainer._logger_connector.update_train_step_metrics()


def _is_trial(trainer: Trainer) -> bool:
    """Whether this is `fast_dev_run`, which leaves nothing behind."""
    return bool(getattr(trainer, "fast_dev_run", False))


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir)


def _best_checkpoint(trainer: Trainer, method: Any) -> Path | None:
    """The file with the best `val/score`; None where there is none, or its encoders cannot be told from the rest."""
    callbacks: list[Any] = trainer.checkpoint_callbacks
    paths = [Path(each.best_model_path) for each in callbacks if getattr(each, "monitor", None) == "val/score"]
    submodules = set(method.modules())
    if not submodules.issuperset(method.encoders().values()):
        return None
    return next((path for path in paths if path.is_file()), None)  # one in shards is a folder


def _export(
    method: Any, folder: Path, best: Path | None, scores: dict[str, float], weights: dict[str, Any] | None
) -> list[str]:
    """Save the backbone of every model; lines that say which they are and how to load them."""
    if best is not None:
        checkpoint = load_tensors(best, mmap=True)
        weights, scores = checkpoint["state_dict"], checkpoint.get("ssl_distill", {}).get("scores", {})
    source = best or folder / "last.ckpt"
    origin = f"of {source.name}" if source.exists() else "after the last step"
    contents, python = [], []
    for i, names in enumerate(models_of(method)):
        name = better_encoder(names, scores)
        path = folder / ("backbone.safetensors" if i == 0 else f"backbone_{name}.safetensors")
        export_method(method, path, name, scores, weights)
        others = [other for other in names if other != name and source.exists()]
        more = f"; for another: ssl-distill export {source} --encoder {others[0]}" if others else ""
        contents.append(f"  {path.name:<22}  the {name} {origin}{more}")
        python += loading_lines(path)
    return [*contents, "load it in Python, with this package or with timm alone:", *(f"  {line}" for line in python)]
