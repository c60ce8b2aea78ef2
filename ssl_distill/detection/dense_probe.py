"""How much a linear map can read off a frozen backbone's places."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from ssl_distill.augment.color import normalize
from ssl_distill.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD
from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.maps import feature_sizes, image_features
from ssl_distill.data.batch import DenseBatch
from ssl_distill.evaluate.features import evaluating
from ssl_distill.export import load_backbone


class DenseLinearProbe(LightningModule):
    """A class for every pixel from a frozen map: batch norm without weights, a 1x1 convolution, bilinear upsampling.

    Logs `dense_probe/miou`, the mean over classes of intersection over union. Batches are `DenseBatch`; train on one
    loader and validate on another: `Trainer.fit(probe, bank_loader, query_loader)`, or with `LabelledData`.

    Args:
        encoder: A file that `ssl-distill export` wrote, a timm name for a network with random weights, or a module as
            `image_features` takes it; a module stays as it is.
        num_classes: Background included.
        image_size: Side in pixels of the images.
        prepare: Image bytes to what the encoder eats, such as a method's `prepare`. None normalises them with the
            file's mean and deviation, or with ImageNet's.
        encoder_kwargs: Further arguments of the timm model, for a name.
        learning_rate: Of AdamW, falling to 0 over the run.
        ignore_label: Pixels of this class do not count.
    """

    def __init__(
        self,
        encoder: str | nn.Module,
        num_classes: int,
        image_size: int = 224,
        prepare: Callable[[Tensor], Tensor] | None = None,
        encoder_kwargs: dict[str, Any] | None = None,
        learning_rate: float = 1e-2,
        ignore_label: int = 255,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2, background included, got {num_classes}.")
        if learning_rate <= 0:
            raise ValueError(f"`learning_rate` must be positive, got {learning_rate}.")
        if isinstance(encoder, str):
            encoder = _encoder(encoder, encoder_kwargs or {})
        width = feature_sizes(encoder, image_size).map_dim
        config: Any = getattr(encoder, "backbone_config", {})
        self.encoder = encoder.requires_grad_(False)
        mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
        self.prepare = prepare or partial(_normalized, mean=mean, std=std)
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.learning_rate = learning_rate
        self.ignore_label = ignore_label
        self.iou = MulticlassJaccardIndex(num_classes, ignore_index=ignore_label)

    def logits(self, batch: DenseBatch) -> Float[Tensor, "B C S S"]:
        """Scores of every class at every pixel."""
        with torch.no_grad(), evaluating(self.encoder):
            feature_map = image_features(self.encoder, self.prepare(batch.image)).map
        scores = self.classifier(self.norm(feature_map))
        return F.interpolate(scores, batch.pixel_label.shape[1:], mode="bilinear")

    def training_step(self, batch: DenseBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of every pixel."""
        loss = F.cross_entropy(self.logits(batch), batch.pixel_label, ignore_index=self.ignore_label)
        self.log("dense_probe/loss", loss.detach())
        return loss

    def validation_step(self, batch: DenseBatch, batch_idx: int) -> None:
        """Count."""
        self.iou.update(self.logits(batch), batch.pixel_label)

    def on_validation_epoch_end(self) -> None:
        """Log over all ranks' images."""
        self.log("dense_probe/miou", self.iou.compute(), sync_dist=True)
        self.iou.reset()

    def configure_optimizers(self) -> Any:
        """AdamW on the classifier."""
        optimizer = torch.optim.AdamW(self.classifier.parameters(), lr=self.learning_rate, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _encoder(path_or_name: str, kwargs: dict[str, Any]) -> nn.Module:
    if Path(path_or_name).suffix == ".safetensors":
        return load_backbone(path_or_name).train()
    return create_backbone(path_or_name, **kwargs)


def _normalized(
    images: UInt8[Tensor, "B 3 H W"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "B 3 H W"]:
    return normalize(images.float() / 255, mean, std)
