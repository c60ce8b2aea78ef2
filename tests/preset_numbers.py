"""Everything that a preset says or leaves to defaults, down to the parts that are made inside of other parts."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn

from ssl_distill.augment.aligned_crop import AlignedCropAugment
from ssl_distill.augment.masked_crop import MaskedCropAugment
from ssl_distill.augment.masked_image import MaskedImageAugment
from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.augment.object_crop import ObjectCropAugment
from ssl_distill.augment.objects import MaskObjects
from ssl_distill.augment.patch_mask import BlockMasks
from ssl_distill.augment.two_view import TwoViewAugment
from ssl_distill.evaluate.fine_tune import FineTune
from ssl_distill.evaluate.fine_tune_crop import FineTuneCrop
from ssl_distill.evaluate.probe_crop import ProbeCrop
from ssl_distill.heads.prototype import PrototypeHead
from ssl_distill.lidar.preparation import Preparation
from ssl_distill.lidar.samples import PairedSamples
from ssl_distill.lidar.teachers import PatchStats
from ssl_distill.lidar.waffleiron import WaffleIron
from ssl_distill.methods.dbot import DBOT
from ssl_distill.methods.dino import DINO
from ssl_distill.methods.ibot import IBOT
from ssl_distill.methods.mokd import MOKD, Learner
from ssl_distill.methods.odis import ODIS
from ssl_distill.methods.pcd import PCD
from ssl_distill.methods.scalr import ScaLR
from ssl_distill.methods.udi import UDI

_MADE_INSIDE: tuple[type, ...] = (
    *(AlignedCropAugment, MaskedCropAugment, MaskedImageAugment, MultiCropAugment, ObjectCropAugment, TwoViewAugment),
    *(BlockMasks, MaskObjects, FineTuneCrop, ProbeCrop, Preparation, PairedSamples, WaffleIron, PrototypeHead),
)
ROOT = Path(__file__).parent.parent
# What decides how fast or where, or is drawn anew by users; nothing that is learned depends on it.
NOT_LEARNED = re.compile(
    r"\.(device|dtype|foreach|fused|maximize|differentiable|capturable|checkpointing|teacher_cache_gib|chunk_size"
    r"|checkpoint|pretrained|evaluation\..*|teacher_maps|lr|optimizer\.weight_decay|compare\.\w+|norm\.\w+|activation\.\w+"
    r"|optimizer\.(decoupled_weight_decay|amsgrad))$"
)
OF_DATA = ("samples", "preparation", "train_every", "object_unit", "min_score", "max_objects")
MADE_BY_DATA = ("samples", "preparation")
PLACEHOLDERS = {"PCD": ("teacher",), "PointProbe": ("backbone",), "PointFinetuning": ("backbone",)}  # files
VIT = {"backbone": "vit_tiny_patch16_224"}
# The smallest method that makes the same parts inside as a large one.
SMALL: dict[str, Callable[[], nn.Module]] = {
    "DINO": lambda: DINO(**VIT, num_prototypes=8),
    "IBOT": lambda: IBOT(**VIT, num_prototypes=8),
    "UDI": lambda: UDI(**VIT, num_prototypes=8),
    "ODIS": lambda: ODIS(**VIT, num_prototypes=8),
    "DBOT": lambda: DBOT(**VIT),
    "MOKD": lambda: MOKD(Learner("one", "resnet10t"), Learner("other", "resnet10t"), num_prototypes=8),
    "PCD": lambda: PCD(nn.Conv2d(3, 8, 32, 32), backbone="resnet10t", queue_size=8),
    "FineTune": lambda: FineTune(2, **VIT),
    "ScaLR": lambda: ScaLR(teacher=PatchStats()),
}


def presets() -> list[Path]:
    """Configs whose header names the paper that their numbers are from."""
    found = []
    for path in sorted(ROOT.glob("configs/*/*.yaml")):
        header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
        if path.parent.name != "sweeps" and "Source:" in header and "scaled down" not in header:
            found.append(path)
    return found


def arguments(preset: Path) -> list[str]:
    """What its header says to run it with."""
    lines = [line.removeprefix("#").strip() for line in preset.read_text().splitlines() if line.startswith("#")]
    start = next(i for i, line in enumerate(lines) if line.startswith("Run:"))
    command = lines[start]
    for line in lines[start + 1 :]:
        if not line.startswith("--"):
            break
        command += f" {line}"
    words = [word for option in re.findall(r"(-c|--[\w.]+) (\S+)", command) for word in option]
    return [str(ROOT / word) if word.startswith("configs/") else word for word in words]


class Made:
    """Remembers the arguments of all parts that are made meanwhile."""

    def __init__(self) -> None:
        self.arguments: dict[int, tuple[Any, dict[str, Any]]] = {}

    @contextmanager
    def remembering(self) -> Iterator[None]:
        replaced = []
        for cls in _MADE_INSIDE:
            original = cls.__init__
            cls.__init__ = self._remembered(original)
            replaced.append((cls, original))
        try:
            yield
        finally:
            for cls, original in replaced:
                cls.__init__ = original

    def _remembered(self, original: Any) -> Any:
        @functools.wraps(original)
        def init(this: Any, *args: Any, **kwargs: Any) -> None:
            bound = inspect.signature(original).bind(this, *args, **kwargs)
            bound.apply_defaults()
            self.arguments.setdefault(id(this), (this, dict(list(bound.arguments.items())[1:])))
            original(this, *args, **kwargs)

        return init

    def flat(self, value: Any, path: str = "") -> dict[str, Any]:
        """Leaves by dotted path."""
        if isinstance(value, Namespace):
            value = vars(value)
            if "class_path" in value:
                name, given = value["class_path"].rpartition(".")[2], vars(value.get("init_args") or Namespace())
                return {path: name, **self._flat_dict(self._inside(self._made(name), given), path)}
            return self._flat_dict(value, path)
        if isinstance(value, dict):
            return self._flat_dict(value, path)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return self._flat_dict(fields, path)
        if id(value) in self.arguments:
            _, given = self.arguments[id(value)]
            return {path: type(value).__name__, **self._flat_dict(self._inside(value, given), path)}
        if inspect.isfunction(value):
            return {path: value.__name__, **self._flat_dict(self._inside_function(value, path), path)}
        if inspect.isclass(value):
            return {path: value.__name__}
        if value is None or isinstance(value, nn.Module):
            return {}
        return {path: _plain(value)}

    @staticmethod
    def _inside(part: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments, and what a part made in the place of None."""
        return {name: getattr(part, name, None) if value is None else value for name, value in given.items()}

    def _made(self, name: str) -> Any:
        return next((part for part, _ in self.arguments.values() if type(part).__name__ == name), None)

    def _inside_function(self, function: Callable[..., Any], path: str) -> dict[str, Any]:
        """Numbers that a function stands for: of the optimiser or the head that it makes, else its own defaults."""
        name = path.rpartition(".")[2]
        if name == "optimizer":
            return function([nn.Parameter(torch.zeros(1))]).defaults
        if name == "head":
            with self.remembering():
                head = function(8, 4)
            if id(head) in self.arguments:
                return dict(list(self.arguments[id(head)][1].items())[2:])
        parameters = inspect.signature(function).parameters.values()
        return {each.name: each.default for each in parameters if isinstance(each.default, (int, float, tuple))}

    def _flat_dict(self, values: dict[str, Any], path: str) -> dict[str, Any]:
        leaves = {}
        for name, value in values.items():
            leaves |= self.flat(value, f"{path}.{name}" if path else name)
        return {key: value for key, value in leaves.items() if not NOT_LEARNED.search(f".{key}")}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def numbers_of(parsed: Namespace) -> dict[str, Any]:
    """All that decides what is learned, by its place in a config; parts that are made inside have their owner's place.

    Args:
        parsed: A run as the command line resolves it.
    """
    model, data, trainer = parsed.model, parsed.data, parsed.trainer
    name = model.class_path.rpartition(".")[2]
    made = Made()
    with made.remembering():
        small: Any = SMALL[name]() if name in SMALL else None
        inside = {"augment": getattr(small, "augment", None), "backbone": _backbone(small)}
        defaults = {"samples": PairedSamples(), "preparation": Preparation()}
    arguments = {**vars(model.init_args)}
    for part, value in inside.items():
        if part in arguments and arguments[part] is None:
            arguments[part] = value
    of_data = vars(data.init_args)
    for part, value in defaults.items():
        if part in of_data and of_data[part] is None:
            of_data[part] = value
    with made.remembering():
        leaves = made.flat({key: value for key, value in arguments.items() if key not in PLACEHOLDERS.get(name, ())})
    leaves |= {f"data.{key}": value for key, value in made.flat({k: of_data.get(k) for k in OF_DATA}).items()}
    num_devices = trainer.devices * trainer.num_nodes
    leaves["images_per_step"] = of_data["batch_size"] * num_devices * trainer.accumulate_grad_batches
    leaves["trainer.max_epochs"] = trainer.max_epochs
    return leaves


def _backbone(small: Any) -> Any:
    return small.student.backbone if isinstance(small, ScaLR) else None
