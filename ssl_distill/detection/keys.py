"""Weights under the names of other detection code."""

import pickle
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

from ssl_distill.callbacks.atomic import replacing
from ssl_distill.evaluate.features import evaluating

_RENAMES = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"(?<=\.)bn(\d)\.", r"conv\1.norm."),
)
_RESNET = re.compile(
    r"(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01]))"
    r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
)


def detectron2_keys(names: Iterable[str]) -> dict[str, str]:
    """detectron2's name of every weight of a ResNet that has timm's or torchvision's names; counters are left out.

    Raises:
        ValueError: If a name is not a classic ResNet's.

    Source: detectron2's ResNet, with the renaming that its converters of torchvision weights make.
    """
    renamed = {}
    for name in names:
        if not _RESNET.fullmatch(name):
            raise ValueError(f"`names` must be those of torchvision's ResNets, got {name}.")
        if name.endswith("num_batches_tracked"):
            continue
        key = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        renamed[name] = key
    return renamed


def torchvision_name(encoder: nn.Module) -> str:
    """Which of torchvision's ResNets, its classifier left out, this network is.

    Raises:
        ValueError: If none has the same weights, or the one that has computes something else with them.
    """
    sizes = _sizes(encoder)
    names = [name for name in _resnets() if sizes == _sizes(_empty(name))]
    found = getattr(encoder, "timm_name", None) or type(encoder).__name__
    if not names:
        stranger = next((f", which has {name}" for name in sizes if not _RESNET.fullmatch(name)), "")
        raise ValueError(f"`encoder` must be one of {', '.join(_resnets())} for this format, got {found}{stranger}.")
    if not _computes_as(encoder, names[0]):
        raise ValueError(
            f"`encoder` must compute what torchvision's {names[0]} does for this format; {found} has the same weights,"
            " but another stem, pooling or activation."
        )
    return names[0]


def save_torchvision(encoder: nn.Module, path: str | Path) -> str:
    """Write a ResNet as a state dict for torchvision's network of that name, without the classifier `fc`.

    Args:
        encoder: A ResNet of timm's or torchvision's.
        path: A .pth file.

    Returns:
        The name.

    Raises:
        ValueError: If torchvision has no such network.
    """
    name = torchvision_name(encoder)
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(_state(encoder), file)
    return name


def save_detectron2(encoder: nn.Module, path: str | Path) -> str:
    """Write a ResNet as the pickle that detectron2 takes as `MODEL.WEIGHTS`.

    Args:
        encoder: A ResNet of timm's or torchvision's.
        path: A .pkl file.

    Returns:
        torchvision's name of the network; `detectron2_settings` tells what else a config needs.

    Raises:
        ValueError: If detectron2 has no such network, or would not take the file for a pickle.
    """
    if Path(path).suffix != ".pkl":
        raise ValueError(f"`path` must end in .pkl, by which detectron2 knows the format, got {path}.")
    name = torchvision_name(encoder)
    state = _state(encoder)
    weights = {key: state[ours].float().numpy() for ours, key in detectron2_keys(state).items()}
    content = {"model": weights, "__author__": "ssl_distill", "matching_heuristics": True}
    with replacing(path) as temporary:
        temporary.write_bytes(pickle.dumps(content))
    return name


def detectron2_settings(name: str, mean: Iterable[float], std: Iterable[float]) -> dict[str, Any]:
    """Keys of a detectron2 config under which the exported network computes what it learned.

    Args:
        name: torchvision's name of the network.
        mean: That its inputs in [0, 1] were normalised with.
        std: The same.
    """
    network: Any = _empty(name)
    settings = {
        "MODEL.RESNETS.DEPTH": int(re.search(r"\d+", name)[0]),  # type: ignore[index]  # all ResNets have a depth
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.NUM_GROUPS": network.groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": network.base_width,
        "MODEL.PIXEL_MEAN": [round(255 * value, 3) for value in mean],  # Units: of pixels from 0 to 255
        "MODEL.PIXEL_STD": [round(255 * value, 3) for value in std],
        "INPUT.FORMAT": "RGB",
    }
    if isinstance(network.layer1[0], BasicBlock):
        settings["MODEL.RESNETS.RES2_OUT_CHANNELS"] = 64
    return settings


def _state(encoder: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in encoder.state_dict().items()}


def _sizes(network: nn.Module) -> dict[str, Size]:
    return {name: value.shape for name, value in network.state_dict().items()}


def _resnets() -> list[str]:
    names: list[str] = models.list_models(models, include=["resne*", "wide_resnet*"])
    return names


@cache
def _empty(name: str) -> nn.Module:
    """torchvision's network without memory for its weights."""
    with torch.device("meta"):
        return _headless(name)


def _headless(name: str) -> nn.Module:
    network: nn.Module = models.get_model(name)
    network.fc = nn.Identity()
    return network


@torch.no_grad()
def _computes_as(encoder: nn.Module, name: str) -> bool:
    """Whether torchvision's network gives the same features: pooling and activations show in no weights."""
    parameter = next(encoder.parameters())
    theirs = _headless(name).to(parameter)
    theirs.load_state_dict(encoder.state_dict())
    images = torch.rand(2, 3, 64, 64).to(parameter)
    with evaluating(encoder), evaluating(theirs):
        ours, expected = encoder(images), theirs(images)
    return bool((ours - expected).norm() <= 0.01 * expected.norm())
