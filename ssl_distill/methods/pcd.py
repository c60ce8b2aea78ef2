"""PCD: pixel-wise contrastive distillation of a frozen teacher into a small student."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_distill.augment.two_view import TwoViewAugment
from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.maps import feature_sizes, image_features
from ssl_distill.backbones.projection_teacher import read_projection_teacher
from ssl_distill.backbones.teacher_maps import computed_maps, fingerprint
from ssl_distill.callbacks.schedules import Schedules
from ssl_distill.distributed import mean_over_ranks
from ssl_distill.evaluate.features import evaluating
from ssl_distill.heads.dense import DenseProjection, MapAttention
from ssl_distill.heads.network import per_view
from ssl_distill.losses.pixel_contrast import pixel_contrast
from ssl_distill.losses.pixel_pairs import PixelPairs, same_view
from ssl_distill.methods.base import Distiller
from ssl_distill.optim.lars import LARS
from ssl_distill.optim.schedules import Cosine, EpochCosine, check_values
from ssl_distill.targets.queue import Queue
from ssl_distill.views import TwoViews

EPOCH_COSINE = EpochCosine(1.0, warmup_epochs=10)


class MapStudent(nn.Module):
    """Backbone, attention between places, projection: images (B, 3, H, W) to maps (B, C, h, w).

    Args:
        backbone: As `image_features` takes it.
        pool: Of the backbone's map, to the teacher's grid.
        attention: (B, D, h, w) to the same.
        head: (B, D, h, w) to (B, C, h, w).
    """

    def __init__(self, backbone: nn.Module, pool: nn.Module, attention: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool = pool
        self.attention = attention
        self.head = head

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Projections at every place."""
        projections: Tensor = self.head(self.attention(self.pool(image_features(self.backbone, images).map)))
        return projections


class PCD(Distiller[TwoViews]):
    """A small student learns every pixel of a frozen teacher's projected map. Source: arXiv 2211.00218.

    The teacher is no submodule: it is not trained, not saved and not sent between ranks, and stays in eval mode. A
    checkpoint knows its fingerprint, and a run is not resumed with another teacher.

    Args:
        teacher: Checkpoint with a projection head, see `read_projection_teacher`, or a module from images to maps.
        teacher_backbone: timm name of the network in the checkpoint; of no use for a module.
        teacher_backbone_kwargs: Its further arguments, such as `img_size`.
        backbone: The student: any timm model by name, or a module.
        backbone_kwargs: Further arguments of the timm model.
        attention: Made from the number of the student's channels; `torch.nn.Identity` for none. It is not exported.
        head: Made from (the student's channels, the teacher's channels).
        grid: Rows and columns that both maps are averaged to; None takes them as they are.
        pairing: Which teacher pixel each student pixel is compared with: `same_view`, `cross_view` (the official
            code's) or `cross_view_aligned` of `losses.pixel_pairs`, or another of their kind.
        queue_size: Number of negatives.
        temperature: Softmax temperature.
        chunk_size: Pixels whose logits are in memory at a time.
        teacher_maps: Teacher and views to its maps of both; `CachedMaps` reads them from disk where it can.
        augment: Batch to views; None is `TwoViewAugment` with its defaults.
        optimizer: Parameter groups to optimiser.
        learning_rate: Rate per step; its start is meant for `reference_batch` images.
        weight_decay: Decay of matrices.
        reference_batch: The rate grows linearly with the global batch over this. None takes it as it is.
        clip_norm: Every gradient tensor is clipped to this norm of its own; 0 for no clipping.
    """

    teacher: nn.Module

    def __init__(
        self,
        teacher: str | Path | nn.Module,
        teacher_backbone: str = "resnet50",
        teacher_backbone_kwargs: dict[str, Any] | None = None,
        backbone: str | nn.Module = "resnet18",
        backbone_kwargs: dict[str, Any] | None = None,
        attention: Callable[[int], nn.Module] = MapAttention,
        head: Callable[[int, int], nn.Module] = DenseProjection,
        grid: int | None = None,
        pairing: Callable[[Tensor, TwoViews], PixelPairs] = same_view,
        queue_size: int = 65536,
        temperature: float = 0.2,
        chunk_size: int = 512,
        teacher_maps: Callable[..., Any] = computed_maps,
        augment: nn.Module | None = None,
        optimizer: OptimizerCallable = LARS,
        learning_rate: EpochCosine | Cosine = EPOCH_COSINE,
        weight_decay: Cosine = Cosine(1e-5, 1e-5),
        reference_batch: int | None = 256,
        clip_norm: float = 0.0,
    ) -> None:
        super().__init__(augment or TwoViewAugment(), optimizer, clip_norm)
        if temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        if chunk_size < 1:
            raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
        if not isinstance(teacher, nn.Module):
            teacher = read_projection_teacher(teacher, teacher_backbone, teacher_backbone_kwargs)
        # Not by nn.Module's own __setattr__, which would make it a submodule.
        object.__setattr__(self, "teacher", teacher.requires_grad_(False).eval())
        size: int = self.augment.global_size  # type: ignore[attr-defined]
        student_backbone = create_backbone(backbone, **(backbone_kwargs or {}))
        sizes, teacher_sizes = feature_sizes(student_backbone, size), map_shape(teacher, size)
        pool = nn.Identity() if grid is None else nn.AdaptiveAvgPool2d(grid)
        if grid is None and sizes.grid != teacher_sizes[1:]:
            ours, theirs = (" x ".join(map(str, each)) for each in (sizes.grid, teacher_sizes[1:]))
            smallest = min(*sizes.grid, *teacher_sizes[1:])
            raise ValueError(
                f"`grid` must be set where maps differ, here {ours} (student) and {theirs} (teacher); try {smallest}."
            )
        self.student = MapStudent(
            student_backbone, pool, attention(sizes.map_dim), head(sizes.map_dim, teacher_sizes[0])
        )
        self.pool = pool
        self.queue = Queue(queue_size, teacher_sizes[0])
        self.pairing = pairing
        self.teacher_maps = teacher_maps
        check_values(0, above=True, temperature=temperature)
        self.temperature = temperature
        self.chunk_size = chunk_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.reference_batch = reference_batch

    def losses(self, views: TwoViews) -> dict[str, Tensor]:
        """Contrast of every student pixel with its teacher pixel, among the queue's image vectors."""
        with torch.no_grad():
            teacher_maps = self.teacher_maps(self.teacher, views)
            first = teacher_maps[0].to(torch.promote_types(teacher_maps.dtype, torch.float32))
            keys = F.normalize(first.mean((2, 3)), dim=1)
            targets, valid = self.pairing(per_view(self.pool, teacher_maps), views)
        student_maps = per_view(self.student, views.images)  # (2, B, C, h, w)

        students, teachers = (maps.movedim(2, -1) for maps in (student_maps, targets))
        if valid is None:
            students, teachers, num_pixels = students.flatten(0, -2), teachers.flatten(0, -2), None
        else:
            students, teachers = students[valid], teachers[valid]
            num_pixels = mean_over_ranks(valid.sum()).clamp(min=1)
        negatives = self.queue.keys
        loss = pixel_contrast(students, teachers, negatives, self.temperature, num_pixels, self.chunk_size)
        if self.monitoring:
            self.health = contrast_health(student_maps[0], keys, students, teachers, negatives, self.temperature)
        self.queue.observe(keys)  # Order matters: the negatives are those from before this step.
        return {"pixel": loss}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The queue moves once per step, however many batches were accumulated."""
        self.queue.update()

    def encoders(self) -> dict[str, nn.Module]:
        """The student's backbone, without attention and head."""
        return {"student": self.student.backbone}

    def configure_callbacks(self) -> list[Callback]:
        """How the knobs move; the teacher stays as it is."""
        rate: Any = self.learning_rate
        return [Schedules(rate, self.weight_decay, self.reference_batch)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which teacher it was."""
        checkpoint["teacher_fingerprint"] = fingerprint(self.teacher)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another teacher."""
        theirs, ours = checkpoint.get("teacher_fingerprint"), fingerprint(self.teacher)
        if theirs != ours:
            raise ValueError(
                f"`teacher` must be the one that the run began with (fingerprint {theirs}), got another ({ours})."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PCD":
        """Take the teacher along to another device or precision."""
        self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)


@torch.no_grad()
def map_shape(network: nn.Module, image_size: int) -> tuple[int, int, int]:
    """Channels, rows and columns of a network's map, by trying."""
    parameter = next(network.parameters())
    with evaluating(network):
        channels, rows, columns = network(parameter.new_zeros(1, 3, image_size, image_size)).shape[1:]
    return channels, rows, columns


@torch.no_grad()
def contrast_health(
    student_maps: Float[Tensor, "B C h w"],
    keys: Float[Tensor, "B C"],
    students: Float[Tensor, "M C"],
    teachers: Float[Tensor, "M C"],
    negatives: Float[Tensor, "K C"],
    temperature: float,
) -> dict[str, Tensor]:
    """How near the student is to its teacher, and how hard the negatives are.

    Returns:
        `positive_cosine` over pixels; `queue_top1`, the share of images whose pooled student vector is nearer to its
        teacher's than to all negatives; `effective_negatives`, the exponential of the entropy of that choice;
        `feature_std` of the pooled vectors, 1 for spread over the sphere and 0 for constant ones.
    """
    pooled = F.normalize(student_maps.float().mean((2, 3)), dim=1)
    keys = keys.to(pooled.dtype)
    cosines = torch.cat([(pooled * keys).sum(1, keepdim=True), pooled @ negatives.to(pooled.dtype).T], dim=1)
    choice = (cosines / temperature).softmax(1)
    return {
        "positive_cosine": F.cosine_similarity(students.float(), teachers.float()).mean(),
        "queue_top1": (cosines.argmax(1) == 0).float().mean(),
        "effective_negatives": torch.special.entr(choice).sum(1).mean().exp(),
        "feature_std": pooled.std(0, correction=0).mean() * pooled.shape[1] ** 0.5,
    }
