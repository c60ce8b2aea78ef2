"""Official checkpoints: what a file holds, whose layout it has, and which networks are in it."""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_distill.reading.tensors import load_tensors

_ANCHORS = {  # a weight that every network of the kind has, and only once
    "ViT": "patch_embed.proj.weight",
    "ResNet": "layer1.0.conv1.weight",
    "WaffleIron": "embed.final.weight",
}
_PARTS = {  # the first part of their weights' names; what else stands beside them are heads
    "ViT": ("cls_token", "reg_token", "pos_embed", "patch_embed", "blocks", "norm"),
    "ResNet": ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"),
    "WaffleIron": ("embed", "waffleiron"),
}
_BRANCHES = ("teacher", "student")


class Found(NamedTuple):
    """A network in a checkpoint.

    Attributes:
        kind: ViT, ResNet or WaffleIron.
        place: Entry of the file, and what stands in front of its weights' names.
        state: Its weights by the names behind that, heads left out.
        beside: All weights of its entry, by full name.
    """

    kind: str
    place: str
    state: dict[str, Tensor]
    beside: Mapping[str, Tensor]

    @property
    def branch(self) -> str | None:
        """Teacher or student, if its place says so."""
        words = re.split(r"[._\W]", self.place)
        return next((branch for branch in _BRANCHES if branch in words), None)


class Layout(NamedTuple):
    """What one paper's published checkpoints are like.

    Attributes:
        evidence: What shows that networks are of this layout and of none before it; empty if nothing does.
        encoders: Name to kind and branch, as the method's `encoders()`; the first is the headline.
        method: Class that the backbone is of.
        mode: How these position embeddings are meant to be resized.
        kwargs: Further arguments of the timm model.
    """

    evidence: Callable[[list[Found]], str]
    encoders: dict[str, tuple[str | None, str]]
    method: str
    mode: str = "dino_v1"
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - a tuple's default, never changed


def _has(found: list[Found], pattern: str) -> str:
    """The first weight whose name matches, or nothing."""
    names = (name for each in found for name in each.beside)
    return next((name for name in names if re.search(pattern, name)), "")


def _waffleiron(found: list[Found]) -> str:
    return next((f"a {each.kind}" for each in found if each.kind == "WaffleIron"), "")


def _pixel_student(found: list[Found]) -> str:
    return _has(found, r"(^|\.)student\.0\.")


def _two_kinds(found: list[Found]) -> str:
    kinds = {each.kind for each in found}
    return "a ResNet and a ViT" if {"ResNet", "ViT"} <= kinds else ""


def _two_class_tokens(found: list[Found]) -> str:
    tokens = (each.state.get("cls_token", torch.empty(1, 1, 0)) for each in found)
    return next((f"{len(token[0])} class tokens" for token in tokens if token.shape[1] > 1), "")


LAYOUTS = {  # the particular ones first
    "scalr": Layout(_waffleiron, {"lidar": ("WaffleIron", "student")}, "scalr.ScaLR"),
    "pcd": Layout(_pixel_student, {"student": (None, "student")}, "pcd.PCD"),
    "mokd": Layout(
        _two_kinds,
        {
            "cnn": ("ResNet", "teacher"),
            "vit": ("ViT", "teacher"),
            "cnn_student": ("ResNet", "student"),
            "vit_student": ("ViT", "student"),
        },
        "mokd.MOKD",
    ),
    "udi": Layout(_two_class_tokens, {name: ("ViT", name) for name in _BRANCHES}, "udi.UDI"),
    "ibot": Layout(
        lambda found: _has(found, r"masked_embed$|last_layer2\."),
        {name: (None, name) for name in _BRANCHES},
        "ibot.IBOT",
    ),
    "dbot": Layout(
        lambda found: _has(found, r"(^|\.)(decoder_|mask_token)"),
        {"student": ("ViT", "student")},
        "dbot.DBOT",
        mode="size",
        kwargs={"global_pool": "avg", "fc_norm": False},  # the output that its classifiers are built on
    ),
    "dino": Layout(
        lambda found: _has(found, r"(^|\.)head\.(mlp|last_layer)\."),
        {name: (None, name) for name in _BRANCHES},
        "dino.DINO",
    ),
}


def read_official(path: str | Path) -> dict[str, Any]:
    """All that a published file holds, without running any code that it may hold.

    Tensors and plain values are loaded, and `argparse.Namespace`, which files of DINO's kind keep their options in.

    Raises:
        ValueError: If there is no such file, it was cut off, or it holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`file` {path} does not exist.")
    content = load_tensors(path, "file", known=[argparse.Namespace])
    if not isinstance(content, Mapping):
        raise ValueError(f"`file` {path} must hold weights by name, got a {type(content).__name__}.")
    return dict(content)


def find_networks(content: Mapping[str, Any], entry: str = "") -> list[Found]:
    """All networks of the kinds that are known, in a file's entries or in the file itself."""
    found = []
    for kind, anchor in _ANCHORS.items():
        for name in content:
            if not isinstance(content[name], Tensor) or not f".{name}".endswith(f".{anchor}"):
                continue
            prefix = name.removesuffix(anchor)
            state = {
                each.removeprefix(prefix): value
                for each, value in content.items()
                if each.startswith(prefix) and each.removeprefix(prefix).partition(".")[0] in _PARTS[kind]
            }
            found.append(Found(kind, f"{entry}{prefix}", state, content))
    for name, value in content.items():
        if isinstance(value, Mapping):
            found += find_networks(value, f"{entry}{name}: ")
    return found


def check_layout(found: list[Found], layout: str, path: str | Path) -> None:
    """Refuse a file that is another paper's.

    A network without heads may be of any layout that has its kind.

    Raises:
        ValueError: If it is; says whose and by what one sees it.
    """
    if not found:
        raise ValueError(
            f"`file` {path} holds no network that is known: no weight is named {', '.join(_ANCHORS.values())}."
        )
    for name, each in LAYOUTS.items():
        if evidence := each.evidence(found):
            if name != layout:
                raise ValueError(
                    f"`--from` is {layout}, but {path} looks like {name}, for it has {evidence}; try --from {name}."
                )
            return
    bare = {"ViT": ("dino", "ibot", "dbot", "mokd", "pcd"), "ResNet": ("dino", "mokd", "pcd")}
    allowed = sorted({name for each in found for name in bare[each.kind]})
    if layout not in allowed:
        kinds = " and ".join(sorted({f"a {each.kind}" for each in found}))
        raise ValueError(
            f"`--from` is {layout}, but {path} looks like another's: it has {kinds} and nothing of {layout}; try --from"
            f" {' or '.join(allowed)}."
        )


def choose(found: Iterable[Found], layout: str, encoder: str | None, path: str | Path) -> tuple[str, Found]:
    """The network that is asked for, and its name.

    Raises:
        ValueError: If there is none, or more than one.
    """
    encoders = LAYOUTS[layout].encoders
    name = encoder or next(iter(encoders))
    if name not in encoders:
        raise ValueError(f"`--encoder` must be one of {', '.join(encoders)} for {layout}, got {name}.")
    kind, branch = encoders[name]
    candidates = [each for each in found if kind in (None, each.kind)]
    if any(each.branch for each in candidates):
        candidates = [each for each in candidates if each.branch == branch]
    if len(candidates) != 1:
        places = "; ".join(f"{each.kind} at {each.place or 'the top'}" for each in found)
        raise ValueError(f"`file` {path} must hold one {name}, found {len(candidates)} among: {places}.")
    return name, candidates[0]
