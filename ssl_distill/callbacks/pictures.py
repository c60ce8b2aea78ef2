"""Pictures in the run folder and in the loggers; a picture that fails never ends a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image
from torch import Tensor

from ssl_distill.callbacks.atomic import replacing


def draws_pictures(trainer: Trainer, pl_module: Any) -> bool:
    """Whether this is a real `fit` of a method: a trial leaves nothing behind, and `validate` must not overwrite."""
    is_real = trainer.state.fn == TrainerFn.FITTING and not getattr(trainer, "fast_dev_run", False)
    return is_real and hasattr(pl_module, "encoders")


def are_images(value: Any) -> TypeGuard[Tensor]:
    """Whether this is a batch of RGB bytes, and not of points or whatever else a method may learn from."""
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == 3 and value.dtype == torch.uint8


def first_of_each(images: UInt8[Tensor, "B 3 S S"]) -> Bool[Tensor, "B"]:
    """Rows that differ from the one before: an image with several labelled objects comes once for each of them."""
    differs = (images[1:] != images[:-1]).flatten(1).any(1)
    return torch.cat([differs.new_ones(1), differs])


def publish(trainer: Trainer, name: str, draw: Callable[[Path], None]) -> None:
    """Write a picture into the run folder on the first rank, and hand it to the loggers that take pictures.

    Args:
        trainer: Its `default_root_dir` is the run folder.
        name: Of the file, without suffix; in loggers it is `pictures/<name>`.
        draw: Writes the picture to a path.
    """
    if not trainer.is_global_zero:
        return
    path = Path(trainer.default_root_dir) / f"{name}.png"
    with replacing(path) as temporary:
        draw(temporary)
    for logger in trainer.loggers:
        with harmless(f"{name} in {type(logger).__name__}"):
            _log_picture(logger, f"pictures/{name}", path, trainer.global_step)


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """Turn an error into a warning: no run is worth less than its pictures."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"no picture of {what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _log_picture(logger: Any, key: str, path: Path, step: int) -> None:
    if hasattr(logger, "log_image"):  # wandb and its like
        logger.log_image(key, [str(path)], step=step)
    elif add_image := getattr(getattr(logger, "experiment", None), "add_image", None):  # TensorBoard
        with Image.open(path) as picture:
            add_image(key, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
