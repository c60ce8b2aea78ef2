"""UDI: unsqueezed class tokens for rich representations (arXiv 2407.17671)."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_distill.augment.aligned_crop import AlignedCropAugment
from ssl_distill.augment.stratified import inside_any
from ssl_distill.backbones.create import check_crop_size, create_backbone, embed_dim_of
from ssl_distill.callbacks.ema_teacher import EMATeacher
from ssl_distill.callbacks.freeze_last_layer import FreezeLastLayer
from ssl_distill.callbacks.schedules import Schedules
from ssl_distill.heads.srs import SampledAttention
from ssl_distill.heads.token import TokenHead
from ssl_distill.heads.unsqueezed import UnsqueezedNetwork
from ssl_distill.losses.consolidated import paired_entropy, point_entropy
from ssl_distill.losses.cross_view import cross_view_entropy
from ssl_distill.methods.base import Distiller
from ssl_distill.optim.parameters import adamw, clip_each_tensor
from ssl_distill.optim.schedules import Cosine, EpochRamp, check_values
from ssl_distill.targets.consolidated import Consolidation
from ssl_distill.targets.health import output_health
from ssl_distill.views import AlignedCrops


class UDI(Distiller[AlignedCrops]):
    """Self-distillation that unsqueezes the class token. Source: arXiv 2407.17671.

    The defaults are the published ones for ViT-S/16 on ImageNet.

    Args:
        backbone: A plain ViT of timm by name, or such a module with two class tokens.
        backbone_kwargs: Further arguments of the timm model, such as `img_size`.
        drop_path_rate: Stochastic depth in the student; the teacher has none.
        num_prototypes: K, the number of outputs.
        head: Made from (embed_dim, num_prototypes), once for the student and once for the teacher.
        srs: Made from (embed_dim, number of the backbone's heads): attention at sampled positions.
        targets: Made from num_prototypes: what teacher outputs become, with a center per level.
        class_weight: Factor of the term of class tokens, which is DINO's.
        multimodal_weight: Factor of the term of second class tokens against consolidated targets.
        patch_weight: Factor of the term of sampled points.
        augment: Batch to crops and positions; None is `AlignedCropAugment` with its defaults.
        optimizer: Parameter groups to optimiser.
        learning_rate: Rate per step; its start is meant for `reference_batch` images.
        weight_decay: Decay of matrices; vectors are not decayed.
        reference_batch: The rate grows linearly with the global batch over this. None takes it as it is.
        momentum: Share of the old teacher in an update.
        student_temperature: Softmax temperature of the student.
        teacher_temperature: Softmax temperature of the teacher; lower is sharper.
        freeze_last_layer_epochs: Epochs in which the student's prototypes stay as they were drawn.
        clip_norm: Every gradient tensor is clipped to this norm of its own, the class tokens together; 0 for no
            clipping.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "vit_small_patch16_224",
        backbone_kwargs: dict[str, Any] | None = None,
        drop_path_rate: float = 0.1,
        num_prototypes: int = 65536,
        head: Callable[[int, int], nn.Module] = TokenHead,
        srs: Callable[[int, int], SampledAttention] = SampledAttention,
        targets: Callable[[int], Consolidation] = Consolidation,
        class_weight: float = 1 / 3,
        multimodal_weight: float = 1 / 3,
        patch_weight: float = 1 / 3,
        augment: nn.Module | None = None,
        optimizer: OptimizerCallable = adamw,
        learning_rate: Cosine = Cosine(5e-4, 1e-5, warmup_epochs=10),
        weight_decay: Cosine = Cosine(0.04, 0.1),
        reference_batch: int | None = 256,
        momentum: Cosine = Cosine(0.996, 1.0),
        student_temperature: float = 0.1,
        teacher_temperature: EpochRamp = EpochRamp(0.04, 0.07, 30),
        freeze_last_layer_epochs: int = 1,
        clip_norm: float = 3.0,
    ) -> None:
        super().__init__(augment or AlignedCropAugment(), optimizer, clip_norm)
        kwargs = {"num_class_tokens": 2, **(backbone_kwargs or {})}
        student_backbone = create_backbone(backbone, drop_path_rate=drop_path_rate, **kwargs)
        embed_dim = embed_dim_of(student_backbone)

        def network(backbone: Any) -> UnsqueezedNetwork:
            num_heads = backbone.blocks[0].attn.num_heads if hasattr(backbone, "blocks") else 1
            return UnsqueezedNetwork(backbone, srs(embed_dim, num_heads), head(embed_dim, num_prototypes))

        self.student = network(student_backbone)
        self.teacher = network(create_backbone(backbone, **kwargs))
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        if isinstance(self.augment, AlignedCropAugment):
            _check_augment(self.augment, self.student.backbone)
        self.targets = targets(num_prototypes)
        self.class_weight = class_weight
        self.multimodal_weight = multimodal_weight
        self.patch_weight = patch_weight
        self.num_prototypes = num_prototypes
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.reference_batch = reference_batch
        self.momentum = momentum
        check_values(0, above=True, student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.freeze_last_layer_epochs = freeze_last_layer_epochs

    def losses(self, views: AlignedCrops) -> dict[str, Tensor]:
        """Class tokens as in DINO, second ones against blends of image and points, points against themselves."""
        global_crops, local_crops, own, other, local = views
        with torch.no_grad():
            teacher = self.teacher.teach(global_crops, other, local)
            targets = self.targets(*teacher, self.teacher.prototypes, self.teacher_temperature.at(self.position))
        student = self.student(global_crops, local_crops, own)

        there = inside_any(own)  # (2, B, S)
        patch_logits = self.student.prototypes(student.patch_vectors[there])
        temperature = self.student_temperature
        class_loss = cross_view_entropy(targets.class_targets, student.class_logits, temperature)
        multimodal_loss = paired_entropy(targets.plus_global, targets.plus_local, student.plus_logits, temperature)
        patch_loss = point_entropy(targets.patch_targets[there], patch_logits, there, temperature)
        if self.monitoring:
            center = self.targets.class_center.value
            health = output_health(targets.class_targets, class_loss, student.class_features, center)
            self.health = health | {"points_per_crop": there.sum(-1).float().mean()}
        return {
            "class": self.class_weight * class_loss,
            "multimodal": self.multimodal_weight * multimodal_loss,
            "patch": self.patch_weight * patch_loss,
        }

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip each tensor of its own, then whatever `trainer.gradient_clip_val` asks for.

        Both class tokens are one tensor in the official code, where timm has two.
        """
        if self.clip_norm > 0:
            tokens = [self.student.backbone.cls_token, self.student.backbone.reg_token]
            nn.utils.clip_grad_norm_([token for token in tokens if token is not None], self.clip_norm)
            apart = {id(token) for token in tokens}
            clip_each_tensor([each for each in self.parameters() if id(each) not in apart], self.clip_norm)
        LightningModule.configure_gradient_clipping(self, optimizer, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The centers move once per step, however many batches were accumulated."""
        self.targets.update()

    def encoders(self) -> dict[str, nn.Module]:
        """The teacher, which is usually better, and the student; their first class tokens."""
        return {"teacher": self.teacher.backbone, "student": self.student.backbone}

    def configure_callbacks(self) -> list[Callback]:
        """How the teacher lives and the knobs move."""
        return [
            Schedules(self.learning_rate, self.weight_decay, self.reference_batch),
            FreezeLastLayer(self.student.head.last_layer, self.freeze_last_layer_epochs),
            EMATeacher([(self.student, self.teacher)], self.momentum),
        ]


def _check_augment(augment: AlignedCropAugment, backbone: Any) -> None:
    """Refuse positions made for patches of another size, and crops that the patches do not tile."""
    size = backbone.patch_embed.patch_size[0]
    if augment.patch_size != size:
        raise ValueError(f"`augment.patch_size` must be that of the backbone, {size} pixels, got {augment.patch_size}.")
    check_crop_size(backbone, augment.global_size, "augment.global_size")
