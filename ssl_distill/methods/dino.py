"""DINO: self-distillation with no labels (arXiv 2104.14294)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.backbones.create import create_backbone, embed_dim_of
from ssl_distill.callbacks.ema_teacher import EMATeacher
from ssl_distill.callbacks.freeze_last_layer import FreezeLastLayer
from ssl_distill.callbacks.schedules import Schedules
from ssl_distill.heads.network import Network
from ssl_distill.heads.prototype import PrototypeHead
from ssl_distill.heads.start import start_equal
from ssl_distill.losses.cross_view import cross_view_entropy
from ssl_distill.methods.base import Distiller
from ssl_distill.optim.parameters import adamw
from ssl_distill.optim.schedules import Cosine, EpochRamp, check_values
from ssl_distill.targets.center import Center
from ssl_distill.targets.health import output_health
from ssl_distill.views import MultiCrop


class DINO(Distiller[MultiCrop]):
    """Self-distillation with no labels. Source: arXiv 2104.14294, algorithm 1.

    The defaults are the official code's for ViT-S/16 on ImageNet.

    Args:
        backbone: Any timm model by name, or a module from (B, 3, H, W) to (B, D).
        backbone_kwargs: Further arguments of the timm model, such as `img_size`.
        drop_path_rate: Stochastic depth in the student; the teacher has none.
        num_prototypes: K, the number of outputs. 65,536 for ImageNet; some 1,024 for 20,000 images.
        head: Made from (embed_dim, num_prototypes), once for the student and once for the teacher.
        targets: Made from num_prototypes: what teacher logits become. `Center`, or `SinkhornKnopp` as in DINOv2.
        compare: Targets (T, B, K), student logits (V, B, K) and temperature to a scalar: `cross_view_entropy`, or
            `matched_entropy` where both see the same views.
        regularizers: Further terms by name, from the student's global features (2, B, D), such as `KoLeo`.
        output_regularizers: Further terms by name, from the student's global logits (2, B, K) over its temperature,
            such as `OutputEntropy`.
        start: How (student, teacher) begin: `start_equal`, or `StartNear` a random teacher.
        teacher_life: Made from pairs of student and teacher, and the momentum: `EMATeacher`, or `FrozenTeacher`.
        augment: Batch to crops; None is `MultiCropAugment` with its defaults.
        optimizer: Parameter groups to optimiser.
        learning_rate: Rate per step; its start is meant for `reference_batch` images.
        weight_decay: Decay of matrices; vectors are not decayed.
        reference_batch: The rate grows linearly with the global batch over this. None takes it as it is.
        momentum: Share of the old teacher in an update.
        student_temperature: Softmax temperature of the student.
        teacher_temperature: Softmax temperature of the teacher; lower is sharper.
        freeze_last_layer_epochs: Epochs in which the student's prototypes stay as they were drawn.
        clip_norm: Every gradient tensor is clipped to this norm of its own; 0 for no clipping.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "vit_small_patch16_224",
        backbone_kwargs: dict[str, Any] | None = None,
        drop_path_rate: float = 0.1,
        num_prototypes: int = 65536,
        head: Callable[[int, int], nn.Module] = PrototypeHead,
        targets: Callable[[int], nn.Module] = Center,
        compare: Callable[[Tensor, Tensor, float], Any] = cross_view_entropy,
        regularizers: dict[str, nn.Module] | None = None,
        output_regularizers: dict[str, nn.Module] | None = None,
        start: Callable[[nn.Module, nn.Module], None] = start_equal,
        teacher_life: Callable[[Sequence[tuple[nn.Module, nn.Module]], Cosine], Callback] = EMATeacher,
        augment: nn.Module | None = None,
        optimizer: OptimizerCallable = adamw,
        learning_rate: Cosine = Cosine(5e-4, 1e-6, warmup_epochs=10),
        weight_decay: Cosine = Cosine(0.04, 0.4),
        reference_batch: int | None = 256,
        momentum: Cosine = Cosine(0.996, 1.0),
        student_temperature: float = 0.1,
        teacher_temperature: EpochRamp = EpochRamp(0.04, 0.04),
        freeze_last_layer_epochs: int = 1,
        clip_norm: float = 3.0,
    ) -> None:
        super().__init__(augment or MultiCropAugment(), optimizer, clip_norm)
        student_backbone = create_backbone(backbone, drop_path_rate=drop_path_rate, **(backbone_kwargs or {}))
        teacher_backbone = create_backbone(backbone, **(backbone_kwargs or {}))
        embed_dim = embed_dim_of(student_backbone)
        self.student = Network(student_backbone, head(embed_dim, num_prototypes))
        self.teacher = Network(teacher_backbone, head(embed_dim, num_prototypes))
        start(self.student, self.teacher)
        self.teacher.requires_grad_(False)
        self.compare = compare
        self.teacher_life = teacher_life
        self.targets: Any = targets(num_prototypes)
        self.regularizers = nn.ModuleDict(regularizers or {})
        self.output_regularizers = nn.ModuleDict(output_regularizers or {})
        self.num_prototypes = num_prototypes
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.reference_batch = reference_batch
        self.momentum = momentum
        check_values(0, above=True, student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.freeze_last_layer_epochs = freeze_last_layer_epochs

    def losses(self, views: MultiCrop) -> dict[str, Tensor]:
        """Cross-entropy between the teacher's global crops and all other crops of the student."""
        with torch.no_grad():
            teacher_logits = self.teacher([views.global_crops])  # (2, B, K)
            targets = self.targets(teacher_logits, self.teacher_temperature.at(self.position))
            self.targets.observe(teacher_logits)  # Order matters: targets use the center from before this step.
        features = self.student.features(views)  # (V, B, D)
        student_logits = self.student.logits(features)  # (V, B, K)

        losses = {"class": self.compare(targets, student_logits, self.student_temperature)}
        num_global = len(views.global_crops)
        for name, regularizer in self.regularizers.items():
            losses[name] = regularizer(features[:num_global])
        for name, regularizer in self.output_regularizers.items():
            losses[name] = regularizer(student_logits[:num_global] / self.student_temperature)
        if self.monitoring:
            self.health = output_health(targets, losses["class"], features, getattr(self.targets, "value", None))
        return losses

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The targets' memory moves once per step, however many batches were accumulated."""
        self.targets.update()

    def encoders(self) -> dict[str, nn.Module]:
        """The teacher, which is usually better, and the student."""
        return {"teacher": self.teacher.backbone, "student": self.student.backbone}

    def configure_callbacks(self) -> list[Callback]:
        """How the teacher lives and the knobs move."""
        return [
            Schedules(self.learning_rate, self.weight_decay, self.reference_batch),
            FreezeLastLayer(self.student.head.get_submodule("last_layer"), self.freeze_last_layer_epochs),
            self.teacher_life([(self.student, self.teacher)], self.momentum),
        ]
