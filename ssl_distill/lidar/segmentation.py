"""Probing and fine-tuning of point networks: a class for every point."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_distill.callbacks.schedules import Schedules
from ssl_distill.evaluate.features import evaluating
from ssl_distill.lidar.batch import PointBatch
from ssl_distill.lidar.official import load_waffleiron
from ssl_distill.lidar.point_probe import linear_head
from ssl_distill.lidar.samples import ScanBatch
from ssl_distill.lidar.segmentation_loss import segmentation_loss, segmentation_scores
from ssl_distill.optim.parameters import adamw
from ssl_distill.optim.schedules import Cosine, EpochCosine, Position

# Lightning's `OptimizerCallable`, in a spelling that the tests' type checker takes.
MakeOptimizer = Callable[[Iterable[Any]], Optimizer]
PROBE_RATE = EpochCosine(1e-3, 1e-5, warmup_epochs=2)
FINETUNING_RATE = EpochCosine(2e-3, 0.0, warmup_epochs=2)


class PointSegmentation(LightningModule, ABC):
    """A backbone with a linear head, trained with labels and judged on whole scans. Subclasses are final.

    Logged are `val/miou`, `val/accuracy` and `val/iou_<class>`, of all points of all ranks.

    Args:
        backbone: The network.
        num_classes: Labels are 0 ... num_classes - 1, or 255.
        optimizer: Parameter groups to optimiser.
        learning_rate: Rate per step.
        weight_decay: Decay of decayed groups.
        lovasz_weight: Of the Lovász term beside the cross-entropy.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        optimizer: MakeOptimizer,
        learning_rate: EpochCosine | Cosine,
        weight_decay: Cosine,
        lovasz_weight: float,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2, got {num_classes}.")
        if lovasz_weight < 0:
            raise ValueError(f"`lovasz_weight` must be at least 0, got {lovasz_weight}.")
        width: Any = backbone.num_features
        self.backbone = backbone
        self.head = linear_head(width, num_classes)
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.lovasz_weight = lovasz_weight
        self.scores = segmentation_scores(num_classes)

    @property
    def position(self) -> Position:
        """Where training stands: what the schedules are functions of."""
        steps_per_epoch = -(-self.trainer.num_training_batches // self.trainer.accumulate_grad_batches)
        return Position(self.trainer.global_step, int(self.trainer.estimated_stepping_batches), int(steps_per_epoch))

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, with `lr_scale` and `decayed`."""

    def forward(self, points: PointBatch) -> Float[Tensor, "P C"]:
        """Logits of every point that was kept."""
        logits: Tensor = self.head(self.tokens(points))
        return logits

    def tokens(self, points: PointBatch) -> Float[Tensor, "P D"]:
        """What the head sees."""
        tokens: Tensor = self.backbone(points)
        return tokens

    def training_step(self, batch: ScanBatch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        logits = self(batch.points)[batch.read_back]
        loss = segmentation_loss(logits, batch.labels, self.lovasz_weight)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation's predictions."""
        self.scores.reset()

    def validation_step(self, batch: ScanBatch, batch_idx: int) -> None:
        """Count right and wrong points, those that were left out among them."""
        self.scores.update(self(batch.points).argmax(1)[batch.read_back], batch.labels)

    def on_validation_epoch_end(self) -> None:
        """Log the scores."""
        scores = self.scores.compute()
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", ()) or range(len(scores["iou"]))
        values = {f"val/iou_{name}": iou for name, iou in zip(names, scores["iou"], strict=True)}
        values |= {f"val/{name}": scores[name] for name in ("miou", "accuracy")}
        self.log_dict(values, sync_dist=True)

    def configure_callbacks(self) -> list[Callback]:
        """How the knobs move."""
        rate: Any = self.learning_rate
        return [Schedules(rate, self.weight_decay, None)]

    def configure_optimizers(self) -> Optimizer:
        """One optimiser over the groups."""
        return self.optimizer(self.parameter_groups())


class PointProbe(PointSegmentation):
    """A linear classifier on a frozen backbone.

    Its batch norms keep the statistics that they have.

    Args:
        backbone: Exported by `ssl-distill`, or a network.
        num_classes: Labels are 0 ... num_classes - 1, or 255.
        backbone_kwargs: What differs from how an exported network was made, such as `grids` of a larger field of view.
        optimizer: Parameter groups to optimiser.
        learning_rate: Rate per step.
        weight_decay: Decay of all parameters of the head.
        lovasz_weight: Of the Lovász term beside the cross-entropy.

    Source: ScaLR (arXiv 2310.17504), by its published code.
    """

    def __init__(
        self,
        backbone: str | Path | nn.Module,
        num_classes: int,
        backbone_kwargs: dict[str, Any] | None = None,
        optimizer: MakeOptimizer = adamw,
        learning_rate: EpochCosine | Cosine = PROBE_RATE,
        weight_decay: Cosine = Cosine(3e-3, 3e-3),
        lovasz_weight: float = 1.0,
    ) -> None:
        network = as_network(backbone, backbone_kwargs).requires_grad_(False)
        super().__init__(network, num_classes, optimizer, learning_rate, weight_decay, lovasz_weight)

    def tokens(self, points: PointBatch) -> Float[Tensor, "P D"]:
        """What the frozen backbone says."""
        with evaluating(self.backbone), torch.no_grad():
            return super().tokens(points)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The head."""
        return [{"params": list(self.head.parameters()), "decayed": True, "weight_decay": 0.0}]


class PointFinetuning(PointSegmentation):
    """Backbone and classifier trained together, earlier layers more slowly.

    Args:
        backbone: Exported by `ssl-distill`, or a network.
        num_classes: Labels are 0 ... num_classes - 1, or 255.
        backbone_kwargs: What differs from how an exported network was made; None is a `drop_path_rate` of 0.2.
        layer_decay: Factor on the rate from one layer to the one before.
        optimizer: Parameter groups to optimiser.
        learning_rate: Rate per step of the head.
        weight_decay: Decay of matrices; vectors are not decayed.
        lovasz_weight: Of the Lovász term beside the cross-entropy.

    Source: ScaLR (arXiv 2310.17504), by its published code.
    """

    def __init__(
        self,
        backbone: str | Path | nn.Module,
        num_classes: int,
        backbone_kwargs: dict[str, Any] | None = None,
        layer_decay: float = 0.99,
        optimizer: MakeOptimizer = adamw,
        learning_rate: EpochCosine | Cosine = FINETUNING_RATE,
        weight_decay: Cosine = Cosine(0.0, 0.0),
        lovasz_weight: float = 1.0,
    ) -> None:
        if not 0 < layer_decay <= 1:
            raise ValueError(f"`layer_decay` must lie in (0, 1], got {layer_decay}.")
        network = as_network(backbone, {"drop_path_rate": 0.2} if backbone_kwargs is None else backbone_kwargs)
        super().__init__(network, num_classes, optimizer, learning_rate, weight_decay, lovasz_weight)
        self.layer_decay = layer_decay

    def parameter_groups(self) -> list[dict[str, Any]]:
        """A group for every layer's matrices, and one for its vectors."""
        return layer_decay_groups(self, len(self.backbone.get_submodule("layers")._modules), self.layer_decay)


def as_network(backbone: str | Path | nn.Module, kwargs: dict[str, Any] | None) -> nn.Module:
    """A network as it is, or the one in an exported file, in train mode."""
    return backbone if isinstance(backbone, nn.Module) else load_waffleiron(backbone, **(kwargs or {})).train()


def layer_decay_groups(module: nn.Module, depth: int, decay: float) -> list[dict[str, Any]]:
    """Optimiser groups with `lr_scale` decay^(depth + 1 - i): i is 0 for the embedding, depth + 1 for the head.

    Args:
        module: Has a `WaffleIron` as `backbone`; whatever else it has is the head.
        depth: The number of the backbone's layers.
        decay: Factor from one layer to the one before.
    """
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((_layer_of(name, depth), parameter.ndim > 1), []).append(parameter)
    return [
        {"params": params, "decayed": decayed, "weight_decay": 0.0, "lr_scale": decay ** (depth + 1 - layer)}
        for (layer, decayed), params in sorted(groups.items(), key=lambda item: item[0])
    ]


def _layer_of(name: str, depth: int) -> int:
    if name.startswith("backbone.embedding."):
        return 0
    if name.startswith("backbone.layers."):
        return int(name.split(".")[2]) + 1
    return depth + 1
