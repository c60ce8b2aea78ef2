"""dBOT: bootstrapped masked feature distillation (arXiv 2209.03917)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_distill.augment.masked_image import MaskedImageAugment
from ssl_distill.backbones.create import create_backbone, embed_dim_of
from ssl_distill.backbones.feature_teacher import FrozenFeatures, StagedFeatures
from ssl_distill.backbones.vit import VisionTransformer
from ssl_distill.callbacks.schedules import Schedules
from ssl_distill.callbacks.staged_teacher import StagedTeacher, forget
from ssl_distill.draws import Draws, run_seed
from ssl_distill.heads.decoder import FeatureDecoder, class_and_patches
from ssl_distill.heads.masked_student import MaskedStudent, check_masked_backbone, start_afresh
from ssl_distill.losses.masked_feature import smooth_l1, standardize
from ssl_distill.methods.base import Distiller
from ssl_distill.optim.parameters import adamw
from ssl_distill.optim.restarts import Restarts
from ssl_distill.optim.schedules import Cosine, EpochCosine
from ssl_distill.sharding import whole_parameters
from ssl_distill.views import MaskedImages

_NO_RANK = -1  # seeds of training batches are those of ranks from 0 on


def dbot_adamw(params: Iterable[Any]) -> torch.optim.AdamW:
    """AdamW with the second moment of masked pre-training: it forgets within 20 steps."""
    return adamw(params, betas=(0.9, 0.95))


class DBOT(Distiller[MaskedImages]):
    """Bootstrapped masked feature distillation. Source: arXiv 2209.03917, section 3.

    The defaults are the published ones for ViT-B/16 on ImageNet.

    Args:
        backbone: A plain ViT of timm by name, or such a module, whose weights are drawn anew. Its output is the mean of
            its patch tokens unless `backbone_kwargs` have `global_pool: token`.
        backbone_kwargs: Further arguments of the timm model, such as `img_size`.
        drop_path_rate: Stochastic depth in the student's encoder, and again in its decoder; the teacher has none.
        decoder: Made from (embed_dim, target_dim, grid, drop_path_rate).
        teacher: A frozen one for the whole run, such as `FrozenFeatures`. None bootstraps: a copy of the untrained
            student first, then the student of the stage before.
        initial_teacher_depth: Blocks of the first bootstrapped teacher; None is as many as the first student has.
        stage_starts: Epochs in which stages begin, the first at 0; the last ends with the run.
        depths: Blocks of the student in each stage, at most the backbone's; None is all of them in all stages.
        initialize: How the student starts a stage, from (student, generator): `start_afresh`, or
            `start_afresh_but_bias` as in the official code.
        restart_optimizer: What becomes of the optimiser at a new stage: `forget`, or `remember` as in the official
            code.
        compare: Predictions and standardised targets (B, M, D) to a scalar: `smooth_l1`, `negative_cosine` or one of
            torch's.
        class_weight: Weight of the class token in the loss, where each hidden patch has 1; 0 leaves it out.
        augment: Batch to images and divisions of their patches; None is `MaskedImageAugment` with its defaults.
        optimizer: Parameter groups to optimiser.
        learning_rate: Rate of a stage, restarted in each; its start is meant for `reference_batch` images.
        weight_decay: Decay of matrices and tokens; vectors are not decayed.
        reference_batch: The rate grows linearly with the global batch over this. None takes it as it is.
        global_clip_norm: The gradient of all parameters together is clipped to this L2 norm; 0 for no clipping.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "vit_base_patch16_224",
        backbone_kwargs: dict[str, Any] | None = None,
        drop_path_rate: float = 0.2,
        decoder: Callable[[int, int, tuple[int, int], float], nn.Module] = FeatureDecoder,
        teacher: FrozenFeatures | None = None,
        initial_teacher_depth: int | None = None,
        stage_starts: Sequence[int] = (0, 800),
        depths: Sequence[int] | None = None,
        initialize: Callable[[nn.Module, torch.Generator], None] = start_afresh,
        restart_optimizer: Callable[[Optimizer], None] = forget,
        compare: Callable[[Tensor, Tensor], Any] = smooth_l1,
        class_weight: float = 1.0,
        augment: nn.Module | None = None,
        optimizer: OptimizerCallable = dbot_adamw,
        learning_rate: EpochCosine = EpochCosine(1.5e-4, 0.0, warmup_epochs=40),
        weight_decay: Cosine = Cosine(0.05, 0.05),
        reference_batch: int | None = 256,
        global_clip_norm: float = 3.0,
    ) -> None:
        super().__init__(augment or MaskedImageAugment(), optimizer, clip_norm=0.0)
        for name, value in {"class_weight": class_weight, "global_clip_norm": global_clip_norm}.items():
            if value < 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}.")
        if teacher is not None and len(stage_starts) > 1:
            raise ValueError(
                f"`stage_starts` must be [0] with a `teacher` of its own, which no student replaces, got"
                f" {list(stage_starts)}."
            )
        kwargs = backbone_kwargs or {}
        encoder = check_masked_backbone(create_backbone(backbone, drop_path_rate=drop_path_rate, **kwargs))
        if "global_pool" not in kwargs:
            _pool_patches(encoder)
        embed_dim, grid = embed_dim_of(encoder), encoder.patch_embed.grid_size
        if isinstance(self.augment, MaskedImageAugment):
            _check_augment(self.augment, encoder)
        target_dim = embed_dim if teacher is None else teacher.embed_dim
        self.student = MaskedStudent(encoder, decoder(embed_dim, target_dim, grid, drop_path_rate))
        self.depths = _check_depths(depths, len(stage_starts), len(encoder.blocks))
        self.initialize = initialize
        self._start_student(stage=0)
        if teacher is None:
            copy = check_masked_backbone(create_backbone(backbone, **kwargs))
            copy.load_state_dict(encoder.state_dict())
            depth = self.depths[0] if initial_teacher_depth is None else initial_teacher_depth
            self.teacher: StagedFeatures | FrozenFeatures = StagedFeatures(copy, depth)
        else:
            _check_teacher(teacher, encoder.patch_embed.patch_size[0], self.student.decoder, self.augment)
            self.teacher = teacher
        self.stage_starts = tuple(stage_starts)
        self.restart_optimizer = restart_optimizer
        self.compare = compare
        self.class_weight = class_weight
        self.learning_rate = Restarts(learning_rate, self.stage_starts)
        self.weight_decay = weight_decay
        self.reference_batch = reference_batch
        self.global_clip_norm = global_clip_norm

    def losses(self, views: MaskedImages) -> dict[str, Tensor]:
        """The teacher's features of the whole image, predicted where the student sees nothing, and of the class."""
        images, kept, hidden = views
        targets = standardize(class_and_patches(self.teacher(images), hidden))  # (B, 1 + Nh, D)
        predictions = self.student(images, kept, hidden)  # (B, 1 + Nh, D)

        total = self.class_weight + hidden.shape[1]
        if self.monitoring:
            self.health = feature_health(targets, predictions, self.compare)
        return {
            "class": self.compare(predictions[:, :1], targets[:, :1]) * (self.class_weight / total),
            "patch": self.compare(predictions[:, 1:], targets[:, 1:]) * (hidden.shape[1] / total),
        }

    def on_train_start(self) -> None:
        """The teacher computes as in evaluation, whatever its dropout (Lightning warns of an earlier `eval`)."""
        super().on_train_start()
        self.teacher.eval()

    @property
    def stage(self) -> int:
        """How often the student became the teacher; part of the checkpoint."""
        return self.teacher.stage if isinstance(self.teacher, StagedFeatures) else 0

    def next_stage(self) -> None:
        """The student becomes the teacher and starts from scratch, equally on all ranks."""
        assert isinstance(self.teacher, StagedFeatures)
        self.teacher.follow(self.student.backbone, self.student.depth)
        self._start_student(self.stage)

    def _start_student(self, stage: int) -> None:
        """Deviation: the official code draws on each rank by its own, so that ranks train different students."""
        seed = Draws(run_seed(), stage).batch_seed(0, _NO_RANK)
        self.student.set_depth(self.depths[stage])
        with whole_parameters(self.student):
            self.initialize(self.student, torch.Generator().manual_seed(seed))

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip all gradients together, then whatever `trainer.gradient_clip_val` asks for."""
        if self.global_clip_norm > 0:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.global_clip_norm)
        super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def encoders(self) -> dict[str, nn.Module]:
        """The student's encoder: the teacher is the one of the stage before."""
        return {"student": self.student.encoder}

    def configure_callbacks(self) -> list[Callback]:
        """How the teacher lives and the knobs move."""
        return [
            # Order matters: a switch comes before the first rate of its stage.
            StagedTeacher(self.stage_starts, self.restart_optimizer),
            Schedules(self.learning_rate, self.weight_decay, self.reference_batch),
        ]


@torch.no_grad()
def feature_health(
    targets: Tensor, predictions: Tensor, compare: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Whether the targets are worth learning, and whether they are learned.

    Args:
        targets: Standardised features (B, M, D).
        predictions: The student's (B, M, D).
        compare: The loss.

    Returns:
        `zero_loss` (loss of predicting 0 everywhere), `target_token_variance` (share of the targets' variance that lies
        between tokens, the rest is between channels of their mean), `feature_std` (the same of predictions: 0 is one
        prediction for all).
    """
    return {
        "zero_loss": compare(torch.zeros_like(targets), targets),
        "target_token_variance": _token_variance(targets),
        "feature_std": _token_variance(predictions.to(targets.dtype)).sqrt(),
    }


def _token_variance(tokens: Tensor) -> Tensor:
    rows = tokens.flatten(0, 1)
    return rows.var(dim=0, correction=0).mean() / rows.square().mean().clamp(min=1e-12)


def _pool_patches(encoder: VisionTransformer) -> None:
    """Let the encoder's output be its mean patch token, which the fine-tuned classifiers are built on."""
    encoder.global_pool = "avg"
    encoder.timm_kwargs = {**encoder.timm_kwargs, "global_pool": "avg", "fc_norm": False}  # type: ignore


def _check_depths(depths: Sequence[int] | None, num_stages: int, most: int) -> tuple[int, ...]:
    """One depth per stage that the backbone has."""
    if depths is None:
        return (most,) * num_stages
    if len(depths) != num_stages or not all(1 <= depth <= most for depth in depths):
        raise ValueError(
            f"`depths` must be one number from 1 to {most}, the backbone's depth, for each of {num_stages} stages, got"
            f" {list(depths)}; `backbone_kwargs: {{depth: n}}` makes a deeper backbone."
        )
    return tuple(depths)


def _check_augment(augment: MaskedImageAugment, encoder: VisionTransformer) -> None:
    """Refuse divisions made for other patches, or for more or fewer of them than the decoder has positions."""
    patch_size, image_size = encoder.patch_embed.patch_size[0], encoder.patch_embed.img_size[0]
    for name, theirs, ours in (
        ("patch_size", augment.patch_size, patch_size),
        ("global_size", augment.global_size, image_size),
    ):
        if theirs != ours:
            raise ValueError(f"`augment.{name}` must be that of the backbone, {ours} pixels, got {theirs}.")


def _check_teacher(teacher: FrozenFeatures, patch_size: int, decoder: Any, augment: Any) -> None:
    """Refuse a teacher whose features would not meet the student's predictions."""
    if teacher.student_patch_size != patch_size:
        raise ValueError(
            f"`teacher.student_patch_size` must be that of the backbone, {patch_size}, got"
            f" {teacher.student_patch_size}."
        )
    ours = (tuple(getattr(augment, "mean", ())), tuple(getattr(augment, "std", ())))
    if all(ours) and ours != teacher.student_normalization:
        raise ValueError(
            f"`teacher.student_mean` and `student_std` must be those of `augment`, {ours}, got"
            f" {teacher.student_normalization}."
        )
    width = decoder.predict.out_features if hasattr(decoder, "predict") else teacher.embed_dim
    if width != teacher.embed_dim:
        raise ValueError(
            f"`decoder` must end in a projection to the teacher's width {teacher.embed_dim}, got {width};"
            " FeatureDecoder takes it as its second argument."
        )
