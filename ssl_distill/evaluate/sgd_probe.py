"""The linear probe of the papers: a classifier on a frozen backbone, trained by SGD on augmented images."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ssl_distill.callbacks.schedules import global_batch_of
from ssl_distill.data.batch import LabelledBatch
from ssl_distill.draws import Draws, run_seed
from ssl_distill.evaluate.features import FeatureBank, encode


class LastClassTokens(nn.Module):
    """Class tokens of a ViT's last blocks, each through the final norm, first of these blocks first.

    Args:
        backbone: A timm vision transformer with a class token.
        num_blocks: How many blocks; DINO takes 4 of ViT-S and 1 of ViT-B.

    Source: DINO (arXiv 2104.14294), appendix F.2.
    """

    def __init__(self, backbone: nn.Module, num_blocks: int = 4) -> None:
        super().__init__()
        self.backbone = check_class_token(backbone)
        depth = len(list(backbone.get_submodule("blocks").children()))
        if not 1 <= num_blocks <= depth:
            raise ValueError(f"`num_blocks` must lie in 1 to {depth}, the backbone's depth, got {num_blocks}.")
        self.num_blocks = num_blocks

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """Concatenated class tokens."""
        tokens = normed_tokens(self.backbone, images, self.num_blocks)
        return torch.cat([class_token for _, class_token in tokens], dim=1)


class ClassAndMeanPatchToken(nn.Module):
    """Class token and mean patch token of a ViT's last block, interleaved: 2j is class j, 2j + 1 is mean j.

    Interleaved so that linear weights released for DINO's ViT-B fit.

    Args:
        backbone: A timm vision transformer with a class token.

    Source: DINO (arXiv 2104.14294), appendix F.2.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = check_class_token(backbone)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """Interleaved tokens."""
        ((patch_tokens, class_token),) = normed_tokens(self.backbone, images, 1)
        return torch.stack([class_token, patch_tokens.mean(dim=1)], dim=2).flatten(1)  # (B, D, 2) to (B, 2 D)


def normed_tokens(backbone: Any, images: Float[Tensor, "B 3 H W"], num_blocks: int) -> list[tuple[Tensor, Tensor]]:
    """Patch tokens (B, N, D) and class token (B, D) after each of the last blocks, through the final norm."""
    tokens = backbone.forward_intermediates(
        images, num_blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    return [(patch_tokens, prefix_tokens[:, 0]) for patch_tokens, prefix_tokens in tokens]


def check_class_token(backbone: nn.Module) -> nn.Module:
    """The backbone, if it has a class token and timm's access to its blocks.

    Raises:
        ValueError: If not.
    """
    if getattr(backbone, "cls_token", None) is None or not hasattr(backbone, "forward_intermediates"):
        raise ValueError(
            f"`backbone` must be a timm vision transformer with a class token, got {type(backbone).__name__};"
            " other backbones are probed as they are."
        )
    return backbone


class SGDLinearProbe(LightningModule):
    """Linear classifiers on a frozen encoder, one per learning rate, trained side by side. The papers' protocol.

    SGD with momentum 0.9, no weight decay; a rate falls from epoch to epoch by a cosine that ends at 0 after the last.
    Each head is judged on its own: `probe/top1_lr<rate>` and `probe/best_top1_lr<rate>`, its best epoch so far, and
    `probe/top1`, `probe/best_top1` of the best head.

    The papers report the best epoch on the validation set, which is a selection on test data: we tell last and best.
    Their training view is `ProbeCrop`.

    Args:
        encoder: From prepared images to features (B, D), such as a ConvNet, `LastClassTokens(vit)` or
            `ClassAndMeanPatchToken(vit)`. It stays as it is.
        feature_dim: D.
        num_classes: Labels are 0 ... num_classes - 1.
        prepare: Images to what the encoder eats, such as a method's `prepare`.
        augment: (batch, draws) to a `LabelledBatch` of the same for training, such as `ProbeCrop`, which cuts from
            whole images where `LabelledData` gives them; None trains on the images as they are evaluated.
        learning_rates: One head for each, meant for `reference_batch` images per step.
        reference_batch: Rates grow linearly with the global batch over this.

    Source: DINO (arXiv 2104.14294), appendix F.2, and its official code.
    """

    best_top1: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        feature_dim: int,
        num_classes: int,
        prepare: Callable[[Tensor], Tensor],
        augment: Callable[[Any, Draws], LabelledBatch] | None = None,
        learning_rates: Sequence[float] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
        reference_batch: int = 256,
    ) -> None:
        super().__init__()
        counts = {"feature_dim": feature_dim, "num_classes": num_classes, "reference_batch": reference_batch}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not learning_rates or min(learning_rates) <= 0 or len(set(learning_rates)) < len(learning_rates):
            raise ValueError(f"`learning_rates` must be one or more different positive numbers, got {learning_rates}.")
        self.encoder = encoder.requires_grad_(False)
        self.prepare = prepare
        self.augment = augment
        self.learning_rates = tuple(learning_rates)
        self.reference_batch = reference_batch
        heads = [nn.Linear(feature_dim, num_classes) for _ in self.learning_rates]
        for head in heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)
        self.register_buffer("best_top1", torch.zeros(len(self.heads)))

    def logits(self, images: Float[Tensor, "B *shape"]) -> Float[Tensor, "heads B C"]:
        """Scores of every head, by one matrix product."""
        weight = torch.cat([head.get_parameter("weight") for head in self.heads])
        bias = torch.cat([head.get_parameter("bias") for head in self.heads])
        features = encode(self.encoder, images)
        return F.linear(features, weight, bias).unflatten(1, (len(self.heads), -1)).transpose(0, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Sum of the heads' cross-entropies: each head gets its own gradient."""
        if self.augment is None:
            images, labels = self.prepare(batch.image), batch.label
        else:
            images, labels, _ = self.augment(batch, Draws(run_seed(), self.current_epoch))
        logits = self.logits(images)
        losses = torch.stack([F.cross_entropy(of_head, labels) for of_head in logits])
        self.log_dict({f"probe/loss_{name}": loss for name, loss in self._by_head(losses.detach()).items()})
        return losses.sum()

    def on_train_epoch_start(self) -> None:
        """Set the rates of the coming epoch."""
        if not self.trainer.max_epochs or self.trainer.max_epochs < 0:
            raise ValueError("`trainer.max_epochs` must be set: the learning rate falls to 0 over the run.")
        global_batch = global_batch_of(self.trainer)
        share = (1 + math.cos(math.pi * self.current_epoch / self.trainer.max_epochs)) / 2
        for group, rate in zip(self.trainer.optimizers[0].param_groups, self.learning_rates, strict=True):
            group["lr"] = rate * global_batch / self.reference_batch * share

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation's predictions."""
        self._right = FeatureBank(self.device)

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Note which heads are right about which image."""
        right = self.logits(self.prepare(batch.image)).argmax(dim=2) == batch.label  # (heads, B)
        self._right.update(right.T.float(), batch.label, batch.index)

    def on_validation_epoch_end(self) -> None:
        """Log accuracies over all ranks' images, none counted twice."""
        top1 = self._right.compute().features.mean(dim=0)
        if not self.trainer.sanity_checking:
            self.best_top1.copy_(torch.maximum(self.best_top1, top1))
        scores = {f"probe/top1_{name}": value for name, value in self._by_head(top1).items()}
        scores |= {f"probe/best_top1_{name}": value for name, value in self._by_head(self.best_top1).items()}
        scores |= {"probe/top1": top1.max(), "probe/best_top1": self.best_top1.max()}
        self.log_dict(scores, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One group per head; `on_train_epoch_start` sets its rate."""
        groups: list[dict[str, Any]] = [{"params": list(head.parameters())} for head in self.heads]
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=0.0)

    def _by_head(self, values: Float[Tensor, "heads"]) -> dict[str, Tensor]:
        return {f"lr{rate:g}": value for rate, value in zip(self.learning_rates, values, strict=True)}
