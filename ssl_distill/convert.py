"""Networks of official checkpoints as backbones of ours."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ssl_distill.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD
from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.official import load_exactly, load_official_vit
from ssl_distill.convert_layouts import LAYOUTS, Found
from ssl_distill.lidar.official import load_official, our_name
from ssl_distill.lidar.waffleiron import WaffleIron

_VITS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
# Convolutions per block, blocks per stage, width of the first: name.
_RESNETS: dict[tuple[int, tuple[int, ...], int], str] = {
    (2, (2, 2, 2, 2), 64): "resnet18",
    (2, (3, 4, 6, 3), 64): "resnet34",
    (3, (3, 4, 6, 3), 64): "resnet50",
    (3, (3, 4, 23, 3), 64): "resnet101",
    (3, (3, 8, 36, 3), 64): "resnet152",
    (3, (3, 4, 6, 3), 128): "wide_resnet50_2",
}


def make_backbone(
    found: Found, layout: str, backbone: str | None = None, backbone_kwargs: Mapping[str, Any] | None = None
) -> nn.Module:
    """The network as one of ours, with its weights.

    Args:
        found: What `choose` gave.
        layout: Whose it is.
        backbone: timm name; None tells it from the sizes of the weights.
        backbone_kwargs: Further arguments of the timm model, or of `WaffleIron`.

    Raises:
        ValueError: If the sizes are no known network's and no name is given, or weights are missing; names them.
    """
    if found.kind == "WaffleIron":
        if backbone is not None:
            raise ValueError(f"`--backbone` names one of timm's networks, which no lidar network is, got {backbone}.")
        waffleiron = WaffleIron(**{**_waffleiron_arguments(found), **(backbone_kwargs or {})})
        load_official(waffleiron, found.state)
        return waffleiron
    name, kwargs = (backbone, {}) if backbone else _ARCHITECTURES[found.kind](found.state)
    kwargs = {**kwargs, **(backbone_kwargs or {})}
    if found.kind == "ResNet":
        network = create_backbone(name, **kwargs)
        counters = {key: value for key, value in network.state_dict().items() if key.endswith("num_batches_tracked")}
        load_exactly(network, {**counters, **found.state})
        return network
    num_class_tokens = found.state.get("cls_token", torch.empty(1, 1, 0)).shape[1]
    mode: Any = LAYOUTS[layout].mode
    network = create_backbone(name, mode, num_class_tokens, **{**LAYOUTS[layout].kwargs, **kwargs})
    load_official_vit(network, found.state)  # type: ignore[arg-type]  # refuses what is no plain ViT by its weights
    return network


def describe(backbone: Any, layout: str, encoder: str, path: str | Path) -> dict[str, Any]:
    """What `export_backbone` is to write beside the weights."""
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    images = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "input_size": [3, *(size or (224, 224))]}
    return {
        "method": f"ssl_distill.methods.{LAYOUTS[layout].method}",
        "encoder": encoder,
        **({"mean": [0.0], "std": [1.0]} if layout == "scalr" else images),
        "scores": {},
        "converted_from": {"file": Path(path).name, "layout": layout},
    }


def _vit_architecture(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    width, _, rows, columns = state["patch_embed.proj.weight"].shape
    depth = _count(state, r"blocks\.(\d+)\.")
    size = _VITS.get((width, depth))
    if size is None or rows != columns or "pos_embed" not in state:
        raise ValueError(
            f"`--backbone` must be given: no known ViT has width {width}, depth {depth} and patches of {rows} x"
            f" {columns}; name timm's model, and what differs from it as --backbone_kwargs '{{\"img_size\": 32}}'."
        )
    kwargs = {}
    name = f"vit_{size}_patch{rows}_224"
    if not timm.is_model(name):
        name = f"vit_{size}_patch{14 if size == 'huge' else 16}_224"
        kwargs["patch_size"] = rows
    num_class_tokens = state["cls_token"].shape[1] if "cls_token" in state else 0
    side = round((state["pos_embed"].shape[1] - num_class_tokens) ** 0.5)
    if side * rows != 224:
        kwargs["img_size"] = side * rows
    return name, kwargs


def _resnet_architecture(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    convolutions = 3 if "layer1.0.conv3.weight" in state else 2
    blocks = tuple(_count(state, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    width = len(state["layer1.0.conv1.weight"])
    if (convolutions, blocks, width) not in _RESNETS:
        raise ValueError(
            f"`--backbone` must be given: no known ResNet has {blocks} blocks of {convolutions} convolutions, the first"
            f" {width} wide; name timm's model."
        )
    return _RESNETS[convolutions, blocks, width], {}


_ARCHITECTURES = {"ViT": _vit_architecture, "ResNet": _resnet_architecture}


def _waffleiron_arguments(found: Found) -> dict[str, Any]:
    """Sizes, from the weights; the grids follow from the field of view and are the defaults."""
    channels, in_features = found.state["embed.conv1.weight"].shape[:2]
    has_statistics = "waffleiron.spatial_mix.0.norm.running_mean" in found.state
    names = {our_name(name) for name in found.beside}
    return {
        "channels": channels,
        "in_features": in_features,
        "depth": _count(found.state, r"waffleiron\.spatial_mix\.(\d+)\."),
        "norm": nn.BatchNorm1d if has_statistics else nn.LayerNorm,
        # ScaLR+, whose head has two layers, is the one with GELU; an activation leaves no weights to tell it by.
        "activation": nn.GELU if "classif.2.weight" in names else nn.ReLU,
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({number[1] for name in state if (number := re.match(pattern, name))})


def parse_kwargs(text: str | None) -> dict[str, Any]:
    """Arguments in JSON.

    Raises:
        ValueError: If it is no JSON object.
    """
    try:
        kwargs = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"`--backbone_kwargs` must be JSON ({error}), got {text}.") from error
    if not isinstance(kwargs, dict):
        raise ValueError(f"`--backbone_kwargs` must be a JSON object such as '{{\"img_size\": 32}}', got {text}.")
    return kwargs
