"""iBOT: image BERT pre-training with an online tokenizer (arXiv 2111.07832)."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_distill.augment.masked_crop import MaskedCropAugment
from ssl_distill.backbones.create import embed_dim_of
from ssl_distill.callbacks.ema_teacher import EMATeacher
from ssl_distill.callbacks.freeze_last_layer import FreezeLastLayer
from ssl_distill.callbacks.schedules import Schedules
from ssl_distill.heads.token import TokenHead
from ssl_distill.heads.token_network import check_crops, student_and_teacher
from ssl_distill.losses.cross_view import cross_view_entropy
from ssl_distill.losses.masked_token import masked_token_entropy
from ssl_distill.methods.base import Distiller
from ssl_distill.optim.parameters import adamw
from ssl_distill.optim.schedules import Cosine, EpochRamp, check_values
from ssl_distill.targets.center import Center
from ssl_distill.targets.health import output_health
from ssl_distill.views import MaskedCrops


class IBOT(Distiller[MaskedCrops]):
    """Masked patch self-distillation with an online tokenizer. Source: arXiv 2111.07832, algorithm 1.

    The defaults are the published ones for ViT-S/16 on ImageNet.

    Args:
        backbone: A plain ViT of timm by name, or such a module.
        backbone_kwargs: Further arguments of the timm model, such as `img_size`.
        drop_path_rate: Stochastic depth in the student; the teacher has none.
        num_prototypes: K, the number of outputs.
        head: Made from (embed_dim, num_prototypes), once for the student and once for the teacher: `TokenHead`, or
            `SeparateTokenHead` for patches with prototypes of their own.
        augment: Batch to crops and masks; None is `MaskedCropAugment` with its defaults.
        optimizer: Parameter groups to optimiser.
        learning_rate: Rate per step; its start is meant for `reference_batch` images.
        weight_decay: Decay of matrices; vectors are not decayed.
        reference_batch: The rate grows linearly with the global batch over this. None takes it as it is.
        momentum: Share of the old teacher in an update.
        center_momentum: Share of the old centers in an update.
        student_temperature: Softmax temperature of the student.
        teacher_temperature: Softmax temperature of the teacher's class token.
        patch_temperature: Softmax temperature of the teacher's patches.
        class_weight: Factor of the class term.
        patch_weight: Factor of the patch term.
        freeze_last_layer_epochs: Epochs in which the student's prototypes stay as they were drawn.
        clip_norm: Every gradient tensor is clipped to this norm of its own; 0 for no clipping.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "vit_small_patch16_224",
        backbone_kwargs: dict[str, Any] | None = None,
        drop_path_rate: float = 0.1,
        num_prototypes: int = 8192,
        head: Callable[[int, int], nn.Module] = TokenHead,
        augment: nn.Module | None = None,
        optimizer: OptimizerCallable = adamw,
        learning_rate: Cosine = Cosine(5e-4, 1e-6, warmup_epochs=10),
        weight_decay: Cosine = Cosine(0.04, 0.4),
        reference_batch: int | None = 256,
        momentum: Cosine = Cosine(0.996, 1.0),
        center_momentum: float = 0.9,
        student_temperature: float = 0.1,
        teacher_temperature: EpochRamp = EpochRamp(0.04, 0.07, 30),
        patch_temperature: EpochRamp = EpochRamp(0.04, 0.07, 30),
        class_weight: float = 1.0,
        patch_weight: float = 1.0,
        freeze_last_layer_epochs: int = 1,
        clip_norm: float = 3.0,
    ) -> None:
        super().__init__(augment or MaskedCropAugment(), optimizer, clip_norm)
        self.student, self.teacher = student_and_teacher(
            backbone, backbone_kwargs, drop_path_rate, lambda embed_dim: head(embed_dim, num_prototypes)
        )
        if isinstance(self.augment, MaskedCropAugment):
            check_crops(self.student.backbone, self.augment)
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim_of(self.student.backbone)))
        self.class_center = Center(num_prototypes, center_momentum)
        self.patch_center = Center(self.teacher.head.num_patch_prototypes, center_momentum)
        self.num_prototypes = num_prototypes
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.reference_batch = reference_batch
        self.momentum = momentum
        check_values(
            0,
            above=True,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            patch_temperature=patch_temperature,
        )
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.patch_temperature = patch_temperature
        self.class_weight = class_weight
        self.patch_weight = patch_weight
        self.freeze_last_layer_epochs = freeze_last_layer_epochs

    def losses(self, views: MaskedCrops) -> dict[str, Tensor]:
        """Class tokens are compared across views, masked patches with themselves as the teacher sees them."""
        with torch.no_grad():
            teacher = self.teacher.teach(views.global_crops, views.masked)
            class_targets = self.class_center(teacher.class_logits, self.teacher_temperature.at(self.position))
            patch_targets = self.patch_center(teacher.patch_logits, self.patch_temperature.at(self.position))
            # Order matters: targets use the centers from before this step.
            self.class_center.observe(teacher.class_logits)
            self.patch_center.observe(teacher.mean_patch_logits)
        student = self.student(*views, self.mask_token)

        class_loss = cross_view_entropy(class_targets, student.class_logits, self.student_temperature)
        patch_loss = masked_token_entropy(patch_targets, student.patch_logits, views.masked, self.student_temperature)
        if self.monitoring:
            self.health = output_health(class_targets, class_loss, student.class_features, self.class_center.value)
        return {"class": self.class_weight * class_loss, "patch": self.patch_weight * patch_loss}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The centers move once per step, however many batches were accumulated."""
        self.class_center.update()
        self.patch_center.update()

    def encoders(self) -> dict[str, nn.Module]:
        """The teacher, which is usually better, and the student."""
        return {"teacher": self.teacher.backbone, "student": self.student.backbone}

    def configure_callbacks(self) -> list[Callback]:
        """How the teacher lives and the knobs move."""
        return [
            Schedules(self.learning_rate, self.weight_decay, self.reference_batch),
            FreezeLastLayer(self.student.head.last_layers, self.freeze_last_layer_epochs),
            EMATeacher([(self.student, self.teacher)], self.momentum),
        ]
