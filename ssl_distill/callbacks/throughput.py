"""How fast training is, and whether it waits for data."""

import time

from lightning.pytorch import Callback, LightningModule, Trainer

from ssl_distill.callbacks.logged_step import is_logged_step

_MEMORY = 0.95  # share of the sums that a step keeps: the last 20 steps or so count


class Throughput(Callback):
    """Images per second over all ranks, and the share of time spent waiting for data.

    Waiting is what passes between the end of a batch and the arrival of the next one on the device
    (`Distiller.batch_arrived_at`). Validation counts as neither. Both numbers are smoothed over some 20 steps, shown in
    the progress bar and logged as `train/images_per_s` and `train/data_wait`.
    """

    def __init__(self) -> None:
        self._images = self._seconds = self._waited = 0.0
        self._ended_at = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out what happened between the epochs."""
        self._ended_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the validation."""
        self._ended_at = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Count the batch that ended."""
        now = time.perf_counter()
        arrived_at = getattr(pl_module, "batch_arrived_at", self._ended_at)
        images = (getattr(trainer.train_dataloader, "batch_size", None) or 0) * trainer.world_size
        self._images = _MEMORY * self._images + images
        self._seconds = _MEMORY * self._seconds + now - self._ended_at
        self._waited = _MEMORY * self._waited + max(arrived_at - self._ended_at, 0.0)
        self._ended_at = now
        if is_logged_step(trainer, trainer.global_step):
            pl_module.log("train/images_per_s", self._images / self._seconds, prog_bar=True)
            pl_module.log("train/data_wait", self._waited / self._seconds, prog_bar=True)
