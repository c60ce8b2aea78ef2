"""Fine-tuning a pre-trained ViT on labels: what masked pre-training is judged by."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import Callback, LightningModule
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.official import load_official_vit
from ssl_distill.backbones.vit import VisionTransformer
from ssl_distill.callbacks.schedules import Schedules
from ssl_distill.data.batch import LabelledBatch
from ssl_distill.draws import Draws, run_seed
from ssl_distill.evaluate.features import FeatureBank
from ssl_distill.evaluate.fine_tune_crop import FineTuneCrop
from ssl_distill.optim.parameters import adamw
from ssl_distill.optim.schedules import Cosine, EpochCosine, Position
from ssl_distill.reading.tensors import load_tensors

_NOT_DECAYED = ("pos_embed", "cls_token", "dist_token")


class FineTune(LightningModule):
    """A ViT and a linear classifier, trained end to end. The defaults are dBOT's for ViT-B/16 on ImageNet.

    Logged: `train/loss`, and `val/top1` over all images of the validation loader.

    Args:
        num_classes: Labels are 0 ... num_classes - 1.
        backbone: A plain ViT of timm by name, or such a module with its weights.
        backbone_kwargs: Further arguments of the timm model. `global_pool: token` classifies the class token after the
            final norm instead of the mean patch token after a norm of its own.
        checkpoint: File with the pre-trained weights: a backbone.safetensors of ours, or an official DINO, iBOT, MAE
            or dBOT one. None trains the backbone as it is.
        drop_path_rate: Stochastic depth.
        augment: (batch, draws) to a `LabelledBatch` of normalised images for training; its `mean` and `std` normalise
            evaluation images too. None is `FineTuneCrop` with its defaults.
        mixup: Parameter of the beta law of mixing whole images; 0 for none.
        cutmix: Parameter of the beta law of pasting one image into another; 0 for none. With both, each batch is as
            likely to get one as the other.
        label_smoothing: Share of the target that is spread over all classes.
        layer_decay: Each layer's rate is this times that of the layer above.
        optimizer: Parameter groups to optimiser.
        learning_rate: Rate of the classifier; its start is meant for `reference_batch` images.
        weight_decay: Decay of matrices; vectors, tokens and positions are not decayed.
        reference_batch: The rate grows linearly with the global batch over this. None takes it as it is.

    Source: dBOT (arXiv 2209.03917), appendix, after BEiT (arXiv 2106.08254) and MAE (arXiv 2111.06377).
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str | nn.Module = "vit_base_patch16_224",
        backbone_kwargs: dict[str, Any] | None = None,
        checkpoint: str | None = None,
        drop_path_rate: float = 0.1,
        augment: nn.Module | None = None,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        label_smoothing: float = 0.1,
        layer_decay: float = 0.65,
        optimizer: Callable[[Iterable], Optimizer] = adamw,
        learning_rate: EpochCosine = EpochCosine(3e-4, 1e-6, warmup_epochs=5),
        weight_decay: Cosine = Cosine(0.05, 0.05),
        reference_batch: int | None = 256,
    ) -> None:
        super().__init__()
        for name, value in {"mixup": mixup, "cutmix": cutmix}.items():
            if value < 0:
                raise ValueError(f"`{name}` must be at least 0 (0: none), got {value}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be at least 0 and below 1, got {label_smoothing}.")
        if not 0 < layer_decay <= 1:
            raise ValueError(f"`layer_decay` must be above 0 and at most 1 (1: equal rates), got {layer_decay}.")
        self.classifier = classifier(num_classes, backbone, backbone_kwargs, checkpoint, drop_path_rate)
        self.augment: Any = augment or FineTuneCrop()
        self.mix = Mixup(
            mixup, cutmix, prob=float(mixup + cutmix > 0), label_smoothing=label_smoothing, num_classes=num_classes
        )
        self.loss = SoftTargetCrossEntropy()
        self.layer_decay = layer_decay
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.reference_batch = reference_batch

    @property
    def position(self) -> Position:
        """Where training stands: what schedules are a function of."""
        steps_per_epoch = -(-self.trainer.num_training_batches // self.trainer.accumulate_grad_batches)
        total_steps = int(self.trainer.estimated_stepping_batches)
        return Position(self.trainer.global_step, total_steps, int(steps_per_epoch))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed drop path and mixing by position, so that a resumed run draws what it would have drawn."""
        seed = Draws(run_seed(), self.trainer.current_epoch).batch_seed(batch_idx, self.global_rank)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy against the classes of mixed images."""
        images, targets, _ = self.augment(batch, Draws(run_seed(), self.current_epoch))
        images = images.to(self.classifier.head.weight.dtype)
        if len(images) % 2:  # images are mixed in pairs, of which the one in the middle would be its own
            images, targets = images[:-1], targets[:-1]
        images, targets = self.mix(images, targets)
        loss: Tensor = self.loss(self.classifier(images), targets)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def prepare(self, image: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Evaluation images as the classifier eats them."""
        dtype = self.classifier.head.weight.dtype
        mean, std = (
            image.new_tensor(values, dtype=dtype).view(3, 1, 1) for values in (self.augment.mean, self.augment.std)
        )
        return (image.to(dtype) / 255 - mean) / std

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation's predictions."""
        self._right = FeatureBank(self.device)

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Note which images are classified rightly."""
        right = self.classifier(self.prepare(batch.image)).argmax(dim=1) == batch.label
        self._right.update(right[:, None].float(), batch.label, batch.index)

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy over all ranks' labelled images, none counted twice."""
        self.log("val/top1", self._right.compute().labelled().features.mean(), prog_bar=True)

    def configure_optimizers(self) -> Optimizer:
        """A group per layer and kind; schedules multiply their `lr_scale`."""
        groups = param_groups_layer_decay(
            self.classifier, weight_decay=1.0, no_weight_decay_list=_NOT_DECAYED, layer_decay=self.layer_decay
        )
        for group in groups:
            group["decayed"] = group.pop("weight_decay") > 0
            group["weight_decay"] = 0.0  # schedules set it
        return self.optimizer(groups)

    def configure_callbacks(self) -> list[Callback]:
        """How the knobs move."""
        return [Schedules(self.learning_rate, self.weight_decay, self.reference_batch)]


def classifier(
    num_classes: int,
    backbone: str | nn.Module,
    backbone_kwargs: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    drop_path_rate: float = 0.0,
) -> Any:
    """A ViT with pre-trained weights and a fresh linear layer on its pooled output.

    Args:
        num_classes: Outputs.
        backbone: As for `FineTune`.
        backbone_kwargs: As for `FineTune`.
        checkpoint: As for `FineTune`.
        drop_path_rate: As for `FineTune`.

    Raises:
        ValueError: If the backbone is no plain ViT, or the checkpoint is not its.
    """
    if num_classes < 1:
        raise ValueError(f"`num_classes` must be at least 1, got {num_classes}.")
    kwargs = {"position_mode": "size", "global_pool": "avg", **(backbone_kwargs or {})}
    model: Any = create_backbone(backbone, drop_path_rate=drop_path_rate, **kwargs)
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"`backbone` must be one of timm's plain ViTs, got {type(model).__name__}.")
    if checkpoint is not None:
        if not isinstance(backbone, str):
            raise ValueError(
                f"`checkpoint` must be left out for a `backbone` module with its weights, got {checkpoint}."
            )
        _load_encoder(model, create_backbone(backbone, **{**kwargs, "global_pool": "token"}), checkpoint)
    model.reset_classifier(num_classes)
    head: Any = model.head
    nn.init.trunc_normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return model


def _load_encoder(model: VisionTransformer, encoder: Any, checkpoint: str) -> None:
    """Pre-trained weights without the final norm where the classifier has one of its own."""
    if not Path(checkpoint).is_file():
        raise ValueError(f"`checkpoint` {checkpoint} does not exist.")
    load_official_vit(encoder, load_tensors(checkpoint))
    result = model.load_state_dict(encoder.state_dict(), strict=False)
    own = [name for name in result.missing_keys if not name.startswith("fc_norm.")]
    unused = [name for name in result.unexpected_keys if not name.startswith("norm.")]
    assert not own + unused, result
