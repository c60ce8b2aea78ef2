"""A detector fine-tuned for a fixed schedule, to compare backbones with."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

_NAMES = {
    "map": "ap",
    "map_50": "ap50",
    "bbox_map": "ap",
    "bbox_map_50": "ap50",
    "segm_map": "mask_ap",
    "segm_map_50": "mask_ap50",
}


def box_average_precision() -> Metric:
    """COCO's average precision of boxes.

    Raises:
        ValueError: If pycocotools is not installed.
    """
    return _average_precision(("bbox",))


def box_and_mask_average_precision() -> Metric:
    """COCO's average precision of boxes, and of masks; for Mask R-CNN.

    Raises:
        ValueError: If pycocotools is not installed.
    """
    return _average_precision(("bbox", "segm"))


def _average_precision(iou_type: tuple[Literal["bbox", "segm"], ...]) -> Metric:
    from torchmetrics.detection import MeanAveragePrecision

    try:
        return MeanAveragePrecision(iou_type=iou_type)
    except ModuleNotFoundError as error:
        raise ValueError("`metric` needs pycocotools; pip install 'ssl-distill[detection]'.") from error


def detector_sgd(params: Iterable[Any]) -> Optimizer:
    """SGD as detectors are trained; the rate is set by the probe."""
    return torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4)


class DetectionProbe(LightningModule):
    """Trains a torchvision detector; logs `detection/ap` and `detection/ap50` of validation images.

    With `box_and_mask_average_precision` also `detection/mask_ap` and `detection/mask_ap50`.

    Batches are (images, targets) lists, see `detection_loader`. The rate warms up linearly and falls to a tenth at each
    milestone, as in the usual 1x schedule.

    Args:
        detector: `FasterRCNN`, `MaskRCNN`, `RetinaNet` or their kind.
        optimizer: Trainable parameters to optimiser; its rate is the peak.
        warmup_steps: Steps in which the rate rises.
        milestones: Shares of the run after which the rate falls.
        metric: Made at the start: a detection metric as torchmetrics has them.
    """

    def __init__(
        self,
        detector: nn.Module,
        optimizer: Callable[[Iterable[Any]], Optimizer] = detector_sgd,
        warmup_steps: int = 100,
        milestones: tuple[float, ...] = (2 / 3, 8 / 9),
        metric: Callable[[], Metric] = box_average_precision,
    ) -> None:
        super().__init__()
        if warmup_steps < 0:
            raise ValueError(f"`warmup_steps` must be at least 0, got {warmup_steps}.")
        if not all(0 < share < 1 for share in milestones):
            raise ValueError(f"`milestones` must be shares of the run between 0 and 1, got {milestones}.")
        self.detector = detector
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.milestones = milestones
        self.metric = metric()

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Sum of the detector's losses."""
        images, targets = batch
        losses = self.detector(images, targets)
        self.log_dict({f"detection/{name}": loss.detach() for name, loss in losses.items()}, batch_size=len(images))
        return torch.stack(list(losses.values())).sum()

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        """Compare detections with targets."""
        images, targets = batch
        detections = self.detector(images)
        with_masks = "segm" in getattr(self.metric, "iou_type", ())
        self.metric.update(
            [_compared(each, with_masks) | {"scores": each["scores"]} for each in detections],
            [_compared(each, with_masks) for each in targets],
        )

    def on_validation_epoch_end(self) -> None:
        """Log over all ranks' images."""
        scores: dict[str, Tensor] = self.metric.compute()
        named = {f"detection/{_NAMES[key]}": value for key, value in scores.items() if key in _NAMES}
        self.log_dict(named, sync_dist=True)
        self.metric.reset()

    def configure_optimizers(self) -> Any:
        """Warm-up and steps."""
        optimizer = self.optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)
        total = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
            return warmup * 0.1 ** sum(step >= share * total for share in self.milestones)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _compared(objects: dict[str, Tensor], with_masks: bool) -> dict[str, Tensor]:
    """What is compared of detections or targets. Detected masks are (n, 1, H, W) probabilities."""
    compared = {key: objects[key] for key in ("boxes", "labels")}
    if with_masks:
        compared["masks"] = objects["masks"].reshape(-1, *objects["masks"].shape[-2:]) > 0.5
    return compared
