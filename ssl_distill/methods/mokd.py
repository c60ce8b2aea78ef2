"""MOKD: two models teach each other (multi-mode online knowledge distillation)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.maps import feature_sizes
from ssl_distill.callbacks.ema_teacher import EMATeacher
from ssl_distill.callbacks.freeze_last_layer import FreezeLastLayer
from ssl_distill.callbacks.group_schedules import GroupSchedules, Knobs
from ssl_distill.heads.prototype import FreePrototypes, PrototypeHead
from ssl_distill.heads.t_head import THead
from ssl_distill.heads.two_headed import TwoHeaded, TwoLogits
from ssl_distill.losses.cross_view import cross_view_entropy
from ssl_distill.losses.matched import matched_entropy
from ssl_distill.methods.base import Distiller
from ssl_distill.optim.joint import JointOptimizer, momentum_sgd
from ssl_distill.optim.parameters import adamw, decay_groups
from ssl_distill.optim.schedules import Cosine, EpochRamp, check_values
from ssl_distill.optim.token_groups import token_head_on_partner
from ssl_distill.targets.center import Center
from ssl_distill.targets.health import output_health
from ssl_distill.views import MultiCrop


def free_prototype_head(in_dim: int, num_prototypes: int) -> PrototypeHead:
    """DINO's head with learned prototype norms."""
    return PrototypeHead(in_dim, num_prototypes, prototypes=FreePrototypes)


@dataclass(frozen=True)
class Learner:
    """One of the two models.

    Attributes:
        name: Its name in logs, checkpoints and `encoders()`.
        backbone: Any timm model by name, or a module with timm's `forward_features` and `forward_head`.
        backbone_kwargs: Further arguments of the timm model, such as `img_size`.
        drop_path_rate: Stochastic depth in the student; the teacher has none.
        head: Made from (width of the backbone's vector, num_prototypes), for student and teacher.
        token_head: Made from (channels of the map, num_prototypes, grid of a global crop, whether the map is a
            transformer's tokens), for student and teacher.
        optimizer: Parameter groups of the student to its optimiser.
        groups: Student to parameter groups; a group with `schedule: "partner"` follows the other model's knobs.
        learning_rate: Rate per step; its start is meant for `reference_batch` images.
        weight_decay: Decay of the decayed groups.
        teacher_temperature: Softmax temperature of this model's teacher for its own student.
        cross_weight: Weight of what this model learns from the other: large for the weaker model.
    """

    name: str
    backbone: str | nn.Module
    backbone_kwargs: dict[str, Any] | None = None
    drop_path_rate: float = 0.0
    head: Callable[[int, int], nn.Module] = PrototypeHead
    token_head: Callable[[int, int, tuple[int, int], bool], nn.Module] = THead
    optimizer: OptimizerCallable = adamw
    groups: Callable[[nn.Module], list[dict[str, Any]]] = decay_groups
    learning_rate: Cosine = Cosine(3e-4, 1e-5, warmup_epochs=10)
    weight_decay: Cosine = Cosine(0.04, 0.4)
    teacher_temperature: EpochRamp = EpochRamp(0.04, 0.07, epochs=30)
    cross_weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no module can be called, and a negative weight."""
        if not self.name.isidentifier():
            raise ValueError(
                f"`name` must be letters, digits and underscores, not starting in a digit, got {self.name!r}."
            )
        if hasattr(nn.ModuleDict, self.name) or self.name in vars(nn.ModuleDict()):
            raise ValueError(f"`name` must be none that PyTorch's modules use themselves, got {self.name!r}.")
        if self.cross_weight < 0:
            raise ValueError(f"`cross_weight` of {self.name} must be at least 0, got {self.cross_weight}.")


RESNET = Learner(
    "cnn",
    "resnet50",
    optimizer=momentum_sgd,
    groups=token_head_on_partner,
    learning_rate=Cosine(0.1, 0.0048, warmup_epochs=10),
    weight_decay=Cosine(1e-4, 1e-4),
    teacher_temperature=EpochRamp(0.04, 0.07, epochs=50),
)
VIT = Learner("vit", "vit_small_patch16_224", drop_path_rate=0.1, head=free_prototype_head, cross_weight=0.1)


class StudentOutputs(NamedTuple):
    """What a student says of all its crops.

    Attributes:
        logits: Of global, then local crops.
        queries: (L, B, D), what it saw in each local crop, for the other model's teacher.
        features: (2, B, E), its global features.
    """

    logits: TwoLogits
    queries: Tensor
    features: Tensor


class TeacherOutputs(NamedTuple):
    """What a teacher says of the global crops.

    Attributes:
        logits: Of both.
        search: (L, B, K), of the first, adapted to the other student's local crops.
    """

    logits: TwoLogits
    search: Tensor


class MOKD(Distiller[MultiCrop]):
    """Two models from scratch that teach themselves and each other. Source: arXiv 2304.06461.

    Each model has a teacher of its own, a moving average, and learns from it as in DINO in two spaces: a head on the
    backbone's vector and a token head on its map. From the other's teacher it learns in the first space as in DINO, in
    the second by feature search: the teacher's token head reads its map anew for what the student saw in a local crop.
    No gradient flows from one model's losses into the other. The defaults are the official recipe for ImageNet.

    Args:
        first: The model that is the headline.
        second: Its partner.
        num_prototypes: K, the number of outputs of all heads.
        targets: Made from num_prototypes, for each teacher and space: what teacher logits become.
        augment: Batch to crops; None is `MultiCropAugment` with the official crop sizes.
        reference_batch: Rates grow linearly with the global batch over this. None takes them as they are.
        momentum: Share of the old teachers in an update.
        student_temperature: Softmax temperature of the students.
        cross_temperature: Softmax temperature of a teacher for the other model's student.
        freeze_last_layer_epochs: Epochs in which all prototypes stay as they were drawn.
        clip_norm: Every gradient tensor is clipped to this norm of its own; 0 for no clipping.
    """

    def __init__(
        self,
        first: Learner = RESNET,
        second: Learner = VIT,
        num_prototypes: int = 65536,
        targets: Callable[[int], nn.Module] = Center,
        augment: nn.Module | None = None,
        reference_batch: int | None = 256,
        momentum: Cosine = Cosine(0.996, 1.0),
        student_temperature: float = 0.1,
        cross_temperature: EpochRamp = EpochRamp(0.04, 0.07, epochs=30),
        freeze_last_layer_epochs: int = 1,
        clip_norm: float = 3.0,
    ) -> None:
        super().__init__(
            augment or MultiCropAugment(global_scale=(0.25, 1.0), local_scale=(0.05, 0.25)), first.optimizer, clip_norm
        )
        if first.name == second.name:
            raise ValueError(f"`second.name` must differ from `first.name`, got {second.name!r} twice.")
        for name, other in ((first.name, second.name), (second.name, first.name)):
            if other == f"{name}_student":
                raise ValueError(f"`name` must not be {other!r}, which is what the student of {name!r} is called.")
        size: int = self.augment.global_size  # type: ignore[attr-defined]
        self.learners = {learner.name: learner for learner in (first, second)}
        self.partner = {first.name: second.name, second.name: first.name}
        self.student = nn.ModuleDict()
        self.teacher = nn.ModuleDict()
        for name, learner in self.learners.items():
            self.student[name] = build(learner, num_prototypes, size, learner.drop_path_rate)
            self.teacher[name] = build(learner, num_prototypes, size)
        check_same_width(self.student)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.targets = nn.ModuleDict(
            {
                name: nn.ModuleDict({space: targets(num_prototypes) for space in TwoLogits._fields})
                for name in self.learners
            }
        )
        self.num_prototypes = num_prototypes
        self.reference_batch = reference_batch
        self.momentum = momentum
        check_values(0, above=True, student_temperature=student_temperature, cross_temperature=cross_temperature)
        self.student_temperature = student_temperature
        self.cross_temperature = cross_temperature
        self.freeze_last_layer_epochs = freeze_last_layer_epochs

    def losses(self, views: MultiCrop) -> dict[str, Tensor]:
        """Self-distillation of each model in two spaces, cross-distillation and search from the other's teacher."""
        students = {name: self.ask_student(name, views) for name in self.learners}
        teachers = {name: self.ask_teacher(name, views, students[self.partner[name]].queries) for name in self.learners}
        losses = {}
        for name, learner in self.learners.items():
            terms = self.terms(name, students[name], teachers[name], teachers[self.partner[name]])
            for term, loss in terms.items():
                losses[f"{name}_{term}"] = loss * learner.cross_weight if term in ("cross", "search") else loss
        if self.monitoring:
            self.health = self.judge(students, teachers, losses)
        # Order matters: every target, also of the other model, used the centers from before this step.
        for name, teacher in teachers.items():
            for space, logits in teacher.logits._asdict().items():
                self.targets_of(name, space).observe(logits)
        return losses

    def ask_student(self, name: str, views: MultiCrop) -> StudentOutputs:
        """All crops through one student: one backbone pass per resolution."""
        student: Any = self.student[name]
        stacks = [student.features(stack) for stack in views if len(stack)]
        logits = student.logits(stacks)
        queries = student.token_head.query(stacks[-1].summary)
        return StudentOutputs(logits, queries[: len(views.local_crops)], stacks[0].vector)

    @torch.no_grad()
    def ask_teacher(self, name: str, views: MultiCrop, queries: Tensor) -> TeacherOutputs:
        """Global crops through one teacher, and the first anew for each of the other student's queries."""
        teacher: Any = self.teacher[name]
        features = teacher.features(views.global_crops)
        return TeacherOutputs(teacher.logits([features]), teacher.token_head.search(features.map[0], queries))

    def terms(
        self, name: str, student: StudentOutputs, teacher: TeacherOutputs, partner: TeacherOutputs
    ) -> dict[str, Tensor]:
        """The four unweighted losses of one model."""
        other = self.partner[name]
        temperature = self.learners[name].teacher_temperature.at(self.position)
        cross_temperature = self.cross_temperature.at(self.position)
        own = {
            space: self.targets_of(name, space)(logits, temperature)
            for space, logits in teacher.logits._asdict().items()
        }
        cross = self.targets_of(other, "vector")(partner.logits.vector, cross_temperature)
        terms = {
            "self": cross_view_entropy(own["vector"], student.logits.vector, self.student_temperature),
            "token": cross_view_entropy(own["token"], student.logits.token, self.student_temperature),
            "cross": cross_view_entropy(cross, student.logits.vector, self.student_temperature),
        }
        if num_local := len(partner.search):
            # Search targets are sharpened but not centred, as in the official code.
            search = (partner.search.to(cross.dtype) / cross_temperature).softmax(-1)
            local_logits = student.logits.token[-num_local:]
            terms["search"] = matched_entropy(search, local_logits, self.student_temperature)
        return terms

    def targets_of(self, name: str, space: str) -> Any:
        """What turns the logits of one teacher in one space into targets."""
        return self.targets[name].get_submodule(space)

    @torch.no_grad()
    def judge(
        self, students: dict[str, StudentOutputs], teachers: dict[str, TeacherOutputs], losses: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Health of both models by name, the worse of the two without a name, and how often the teachers agree."""
        signs, token_signs = (
            {
                name: self.judge_model(name, space, students[name], teacher, losses[f"{name}_{term}"])
                for name, teacher in teachers.items()
            }
            for space, term in (("vector", "self"), ("token", "token"))
        )
        first, second = signs.values()
        winners = [teacher.logits.vector.argmax(-1) for teacher in teachers.values()]
        return {
            **{f"{name}_{sign}": value for name, of_model in signs.items() for sign, value in of_model.items()},
            **{f"{name}_token_{sign}": token_signs[name][sign] for name in signs for sign in ("teacher_entropy", "kl")},
            # Uniform outputs have a large entropy, all other failures show in small numbers.
            **{sign: torch.minimum(first[sign], second[sign]) for sign in ("kl", "mean_output_entropy", "feature_std")},
            "teacher_entropy": torch.maximum(first["teacher_entropy"], second["teacher_entropy"]),
            "agreement": (winners[0] == winners[1]).float().mean(),
        }

    def judge_model(
        self, name: str, space: str, student: StudentOutputs, teacher: TeacherOutputs, loss: Tensor
    ) -> dict[str, Tensor]:
        """Health of one model in one space, where it learns from its own teacher."""
        targets = self.targets_of(name, space)
        probabilities = targets(
            getattr(teacher.logits, space), self.learners[name].teacher_temperature.at(self.position)
        )
        return output_health(probabilities, loss, student.features, getattr(targets, "value", None))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The targets' memories move once per step, however many batches were accumulated."""
        for name in self.learners:
            for space in TwoLogits._fields:
                self.targets_of(name, space).update()

    def encoders(self) -> dict[str, nn.Module]:
        """Both teachers by name, which are usually better, and both students."""
        teachers = {name: self.teacher[name].get_submodule("backbone") for name in self.learners}
        return {
            **teachers,
            **{f"{name}_student": self.student[name].get_submodule("backbone") for name in self.learners},
        }

    def models(self) -> list[list[str]]:
        """Names of the encoders of each model; an export without a name would not know which model is meant."""
        return [[name, f"{name}_student"] for name in self.learners]

    def configure_callbacks(self) -> list[Callback]:
        """How the teachers live and the knobs move."""
        knobs = {name: Knobs(learner.learning_rate, learner.weight_decay) for name, learner in self.learners.items()}
        heads = [student.get_submodule(head) for student in self.student.values() for head in ("head", "token_head")]
        prototypes = nn.ModuleList(head.get_submodule("last_layer") for head in heads)
        return [
            GroupSchedules(knobs, self.reference_batch),
            FreezeLastLayer(prototypes, self.freeze_last_layer_epochs),
            EMATeacher([(self.student, self.teacher)], self.momentum),
        ]

    def configure_optimizers(self) -> Optimizer:
        """Each model's own optimiser, behind one step."""
        optimizers = []
        for name, learner in self.learners.items():
            optimizer = learner.optimizer(learner.groups(self.student[name]))
            schedules = {"own": name, "partner": self.partner[name]}
            for group in optimizer.param_groups:
                group["schedule"] = schedules[group.get("schedule", "own")]
            optimizers.append(optimizer)
        return JointOptimizer(optimizers)


def build(learner: Learner, num_prototypes: int, image_size: int, drop_path_rate: float = 0.0) -> TwoHeaded:
    """Backbone and both heads of a student or teacher."""
    backbone = create_backbone(learner.backbone, drop_path_rate=drop_path_rate, **(learner.backbone_kwargs or {}))
    sizes = feature_sizes(backbone, image_size)
    head = learner.head(sizes.vector_dim, num_prototypes)
    token_head = learner.token_head(sizes.map_dim, num_prototypes, sizes.grid, sizes.is_tokens)
    return TwoHeaded(backbone, head, token_head)


def check_same_width(students: nn.ModuleDict) -> None:
    """Refuse token heads that cannot answer each other's queries."""
    widths = {name: student.get_submodule("token_head").embed_dim for name, student in students.items()}
    if len(set(widths.values())) > 1:
        found = " and ".join(f"{width} in {name}" for name, width in widths.items())
        raise ValueError(f"`embed_dim` must be the same in both `token_head`, got {found}.")
