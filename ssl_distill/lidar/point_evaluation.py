"""A linear probe on a point network, in the validation loop of a method."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from ssl_distill.callbacks.atomic import replacing
from ssl_distill.distributed import gather_rows
from ssl_distill.evaluate.evaluation import Evaluation
from ssl_distill.evaluate.features import evaluating
from ssl_distill.evaluate.report import Scores
from ssl_distill.lidar.frames import IGNORED
from ssl_distill.lidar.pictures import draw_birdseye, draw_pairs, feature_colors
from ssl_distill.lidar.point_probe import calibrated, fit_point_probe
from ssl_distill.lidar.samples import PointsAndImages, ScanBatch
from ssl_distill.lidar.segmentation_loss import segmentation_scores

ENCODER = "lidar"


class PointEvaluation(Evaluation):
    """Judges a method's point network by a linear probe, before the first step and at every validation.

    A method that returns it from `configure_callbacks` has it in place of `Evaluation`, whose table, history and
    baseline it shares. Bank and queries are whole scans, `ScanBatch`: the probe learns from points of the bank and
    predicts all points of the queries. Logged are `val/lidar/linear_miou` and more, and `val/score`.

    The baseline is the untrained network with batch-norm statistics of some training batches: with those that it was
    made with it would look worse than it is. A picture of the first query scan from above, `birdseye.png`, and one of
    points over a camera's picture, `pairs.png`, are left in the trainer's `default_root_dir`.

    Args:
        steps: Optimiser steps of the probe.
        points_per_step: Points in each.
        learning_rate: Of the probe's AdamW.
        points_per_scan: Most points of a bank scan that are kept.
        calibration_batches: Training batches for the baseline's statistics.
    """

    def __init__(
        self,
        steps: int = 600,
        points_per_step: int = 8192,
        learning_rate: float = 1e-2,
        points_per_scan: int = 8192,
        calibration_batches: int = 25,
    ) -> None:
        super().__init__()
        counts = {"steps": steps, "points_per_step": points_per_step, "points_per_scan": points_per_scan}
        for name, value in {**counts, "calibration_batches": calibration_batches}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if learning_rate <= 0:
            raise ValueError(f"`learning_rate` must be positive, got {learning_rate}.")
        self.steps = steps
        self.points_per_step = points_per_step
        self.learning_rate = learning_rate
        self.points_per_scan = points_per_scan
        self.calibration_batches = calibration_batches
        self._bank: list[tuple[Tensor, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what is paired with what."""
        data: Any = getattr(trainer, "datamodule", None)
        if data is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        sample = data.training_set()[0]
        if isinstance(sample, PointsAndImages):
            with replacing(Path(trainer.default_root_dir) / "pairs.png") as temporary:
                draw_pairs(sample.images[0], sample.pixels[:, 1:], sample.points.features[:, 4], temporary)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start collecting.

        Raises:
            ValueError: If there are not two validation loaders, or the data module knows no classes.
        """
        data: Any = getattr(trainer, "datamodule", None)
        self._class_names = tuple(getattr(data, "class_names", ()))
        if len(trainer.num_val_batches) != 2 or not self._class_names:
            raise ValueError(
                "`PointEvaluation` needs a LidarData module with labels, and bank and queries as validation loaders."
            )
        self._network = pl_module.encoders()[ENCODER]
        if trainer.sanity_checking:
            batches = (pl_module.transfer_batch_to_device(batch.points, pl_module.device, 0)
                       for batch in data.calibration_batches(self.calibration_batches))  # fmt: skip
            self._network = calibrated(self._network, batches)
        self._bank = []
        self._probe: nn.Module | None = None
        self._scans = [0, 0]
        self._picture: tuple[Tensor, ...] = ()
        self._scores = segmentation_scores(len(self._class_names)).to(pl_module.device)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep points of the bank; predict the queries as they come, so that memory does not grow with them."""
        self._scans[dataloader_idx] += len(batch.num_read)
        with evaluating(self._network), torch.no_grad(), torch.autocast(batch.labels.device.type, enabled=False):
            tokens = self._network(batch.points).float()
        if dataloader_idx == 0:
            rows = _labelled_rows(batch, self.points_per_scan)
            self._bank.append((tokens[batch.read_back[rows]], batch.labels[rows]))
            return
        if self._probe is None:
            self._learn()
        assert self._probe is not None
        predicted = self._probe(tokens).argmax(1)[batch.read_back]
        self._scores.update(predicted, batch.labels)
        if not self._picture:
            first = slice(0, int(batch.num_read[0]))
            seen = tokens[batch.read_back[first]]
            parts = (batch.xyz[first], batch.labels[first], predicted[first], feature_colors(seen))
            self._picture = tuple(part.cpu() for part in parts)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge, log, print, draw."""
        super().on_validation_epoch_end(trainer, pl_module)
        draws = trainer.is_global_zero and not trainer.sanity_checking
        if draws and self._picture and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set where mypy is blind
            xyz, truth, predicted, colors = (part.numpy() for part in self._picture)
            panels = {"truth": truth, "predicted": predicted, "features": colors}
            with replacing(Path(trainer.default_root_dir) / "birdseye.png") as temporary:
                draw_birdseye(xyz, panels, self._class_names, temporary)

    def _learn(self) -> None:
        """Train the probe on the bank's points of all ranks."""
        tokens, labels = (gather_rows(torch.cat(column)) for column in zip(*self._bank, strict=True))
        self._bank = []
        self._probe = fit_point_probe(
            tokens, labels, len(self._class_names), self.steps, self.points_per_step, self.learning_rate
        )

    def _judge(self) -> tuple[Scores, dict[str, Any], float]:
        """Scores of the network, how they came about, and the headline."""
        if self._probe is None:  # no query scan on this rank: it takes part in the gathering all the same
            self._learn()
        found = self._scores.compute()
        scores = {"linear_miou": float(found["miou"]), "linear_accuracy": float(found["accuracy"])}
        for name, iou in zip(self._class_names, found["iou"].tolist(), strict=True):
            scores[f"linear_iou_{name}"] = iou
        protocol = {
            "bank scans": self._scans[0],
            "query scans": self._scans[1],
            "probe": {
                "steps": self.steps,
                "points per step": self.points_per_step,
                "AdamW": self.learning_rate,
                "points per bank scan at most": self.points_per_scan,
                "baseline's calibration batches": self.calibration_batches,
            },
        }
        return {ENCODER: scores}, protocol, scores["linear_miou"]


def _labelled_rows(batch: ScanBatch, points_per_scan: int) -> Int[Tensor, "M"]:
    """Rows of points with a class, of large scans only some, always the same."""
    rows, start = [], 0
    for count, number in zip(batch.num_read.tolist(), batch.index.tolist(), strict=True):
        known = (batch.labels[start : start + count] != IGNORED).nonzero()[:, 0]
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(number))[:points_per_scan]
        rows.append(start + known[order.to(known.device)])
        start += count
    return torch.cat(rows)
