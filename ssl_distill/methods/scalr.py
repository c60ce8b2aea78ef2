"""ScaLR: an image foundation model taught to a lidar network."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_distill.backbones.teacher_maps import fingerprint
from ssl_distill.callbacks.schedules import Schedules
from ssl_distill.distributed import mean_over_ranks
from ssl_distill.draws import Draws
from ssl_distill.lidar.batch import PointBatch
from ssl_distill.lidar.inverse_sqrt import InverseSqrt
from ssl_distill.lidar.point_evaluation import PointEvaluation
from ssl_distill.lidar.read_out import Placement, corner_aligned, read_out
from ssl_distill.lidar.samples import PointsAndImages
from ssl_distill.lidar.teachers import ImageTeacher, TokenCache, ViTTeacher
from ssl_distill.lidar.waffleiron import WaffleIron
from ssl_distill.losses.point_distance import point_distance, unit
from ssl_distill.methods.base import Distiller
from ssl_distill.optim.parameters import adamw
from ssl_distill.optim.schedules import Cosine, EpochCosine

RATE = EpochCosine(2e-3, 1e-5, warmup_epochs=1)


class ScaLR(Distiller[PointsAndImages]):
    """A lidar network learns the features of pixels that see its points. Source: arXiv 2310.17504.

    The teacher is no submodule: it is not trained, not saved and not sent between ranks, and stays in eval mode. A
    checkpoint knows its fingerprint, and a run is not resumed with another teacher. What it says of a picture is kept,
    because pictures are not augmented.

    The defaults are the published code's.

    Args:
        backbone: The student: from a `PointBatch` to tokens; its `num_features` is their width. None is `WaffleIron`
            of ScaLR's size.
        teacher: From pictures in [0, 1] to a grid of features; None is DINOv2's ViT-L/14 with timm's weights.
        head: Made from (the student's width, the teacher's width).
        distance: Of student and teacher features, and the number of pairs per rank: `point_distance`, or
            `squared_point_distance` or `cosine_point_distance` of `losses.point_distance`.
        placement: Where pixels lie in the teacher's grid: `corner_aligned` as published, or `half_pixel` of
            `lidar.read_out`, which is right up to the borders.
        teacher_cache_gib: Main memory per rank for what the teacher said; 0 for none.
        parameter_groups: Module to optimiser groups: `all_decayed` as published, or
            `ssl_distill.optim.parameters.decay_groups`, which spares vectors.
        evaluation: What judges the student at validations; None is `PointEvaluation` with its defaults.
        optimizer: Parameter groups to optimiser.
        learning_rate: Rate per step, whatever the batch. The published warm-up is 3500 steps, an epoch of nuScenes.
        weight_decay: Decay of decayed groups.
        clip_norm: Every gradient tensor is clipped to this norm of its own; 0 for no clipping.
    """

    teacher: ImageTeacher

    def __init__(
        self,
        backbone: nn.Module | None = None,
        teacher: ImageTeacher | None = None,
        head: Callable[[int, int], nn.Module] = nn.Linear,
        distance: Callable[[Tensor, Tensor, Tensor], Any] = point_distance,
        placement: Placement = corner_aligned,
        teacher_cache_gib: float = 2.0,
        parameter_groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
        evaluation: PointEvaluation | None = None,
        optimizer: OptimizerCallable = adamw,
        learning_rate: EpochCosine | InverseSqrt | Cosine = RATE,
        weight_decay: Cosine = Cosine(0.03, 0.03),
        clip_norm: float = 0.0,
    ) -> None:
        super().__init__(AsItIs(), optimizer, clip_norm)
        # Not by nn.Module's own __setattr__, which would make it a submodule.
        object.__setattr__(self, "teacher", (teacher or ViTTeacher()).requires_grad_(False).eval())
        network: Any = backbone or WaffleIron()
        self.student = PointStudent(network, head(network.num_features, self.teacher.num_features))
        self.teacher_cache = TokenCache(teacher_cache_gib)
        self.distance = distance
        self.placement = placement
        self.parameter_groups = parameter_groups or all_decayed
        self.evaluation = evaluation or PointEvaluation()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    def losses(self, views: PointsAndImages) -> dict[str, Tensor]:
        """Mean distance between what the student says of a point and the teacher of its pixel."""
        image_size = (views.images.shape[2], views.images.shape[3])
        with torch.no_grad():
            tokens = self.teacher_cache(self.teacher, views.images, views.picture.tolist())  # (B, D, h, w)
            targets = read_out(tokens, views.pixels, image_size, self.placement)
        features = self.student(views.points)  # (P, D)

        # Deviation: the published code averages over each rank's pairs; here ranks with more pairs weigh more, so that
        # two ranks with half the batch each equal one with all of it.
        num_pairs = mean_over_ranks(torch.tensor(float(len(targets)), device=targets.device))
        if self.monitoring:
            self.health = pair_health(features, targets)
        return {"point": self.distance(features, targets, num_pairs)}

    def encoders(self) -> dict[str, nn.Module]:
        """The student's backbone, without its head."""
        return {"lidar": self.student.backbone}

    def configure_callbacks(self) -> list[Callback]:
        """How the knobs move, and what judges point networks in place of the evaluation of images."""
        rate: Any = self.learning_rate
        return [Schedules(rate, self.weight_decay, None), self.evaluation]

    def configure_optimizers(self) -> Optimizer:
        """One optimiser over the student."""
        return self.optimizer(self.parameter_groups(self))

    def setup(self, stage: str) -> None:
        """Check the data against the networks, and fit a teacher that needs it."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage != "fit" or data is None:
            return
        ours = getattr(self.student.backbone, "grids", None)
        if ours is not None and ours != data.preparation.grids:
            raise ValueError(
                f"`grids` must be the same in `backbone` and `preparation`, got {ours} and {data.preparation.grids}."
            )
        if hasattr(data.samples, "image_size"):
            self.teacher.check_image_size(data.samples.image_size)
        if self.teacher.num_pictures_to_fit:
            self.teacher.fit(data.sample_images(self.teacher.num_pictures_to_fit))

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Nothing: features of points are normalised in loader processes, with each sensor's own numbers."""
        return (0.0,), (1.0,)

    @cached_property
    def teacher_fingerprint(self) -> str:
        """Hash of the teacher's weights, made once: it takes seconds for a large one."""
        return fingerprint(self.teacher)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which teacher it was."""
        checkpoint["teacher_fingerprint"] = self.teacher_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another teacher; an evaluation needs none."""
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            return
        theirs = checkpoint.get("teacher_fingerprint")
        if theirs != self.teacher_fingerprint:
            raise ValueError(
                f"`teacher` must be the one that the run began with (fingerprint {theirs}), got another"
                f" ({self.teacher_fingerprint}); one that is fitted to the data changes with them."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScaLR":
        """Take the teacher along to another device or precision."""
        self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)


class AsItIs(nn.Module):
    """No augmentation on the device: points are augmented in loader processes, pictures never."""

    def forward(self, batch: PointsAndImages, draws: Draws) -> PointsAndImages:
        """The batch."""
        return batch


class PointStudent(nn.Module):
    """Backbone and head, which is thrown away afterwards.

    Args:
        backbone: From a `PointBatch` to tokens (P, C).
        head: (P, C) to (P, D).
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, points: PointBatch) -> Float[Tensor, "P D"]:
        """A feature of every point."""
        features: Tensor = self.head(self.backbone(points))
        return features


def two_layer_head(in_features: int, out_features: int, hidden_features: int = 2048) -> nn.Sequential:
    """ScaLR+'s head."""
    return nn.Sequential(nn.Linear(in_features, hidden_features), nn.ReLU(), nn.Linear(hidden_features, out_features))


def all_decayed(module: nn.Module) -> list[dict[str, Any]]:
    """One group of all trainable parameters, vectors too: what the published code does."""
    return [
        {"params": [each for each in module.parameters() if each.requires_grad], "decayed": True, "weight_decay": 0.0}
    ]


@torch.no_grad()
def pair_health(students: Float[Tensor, "P D"], teachers: Float[Tensor, "P D"]) -> dict[str, Tensor]:
    """How near the student is to its teacher, and how much both tell points apart.

    Returns:
        `positive_cosine`, mean over pairs; `feature_std` and `teacher_std`, 1 for unit vectors spread over the sphere
        and 0 for constant ones.
    """
    ours, theirs = unit(students), unit(teachers)
    spread = [rows.std(0, correction=0).mean() * rows.shape[1] ** 0.5 for rows in (ours, theirs)]
    return {"positive_cosine": (ours * theirs).sum(1).mean(), "feature_std": spread[0], "teacher_std": spread[1]}
