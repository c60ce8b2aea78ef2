"""Trained backbones as plain files that timm loads, and back."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ssl_distill
from ssl_distill.backbones import presets
from ssl_distill.backbones.create import create_backbone
from ssl_distill.callbacks.atomic import replacing

_KEY = "ssl_distill"  # all our metadata is one JSON text under this key: safetensors holds only strings
_LOADING = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")  # of timm
# Measures of evaluation that can rank encoders; an object's features are read inside its mask first of all.
_DECISIVE = ("knn_top1", "linear_top1", "knn_top1_masked", "linear_top1_masked")


def export_backbone(
    encoder: nn.Module,
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Save an encoder's weights under timm's parameter names.

    Args:
        encoder: What `Distiller.encoders()` gives; its `timm_name` and `timm_kwargs` say how timm makes it again,
            or its `loader` names the function that does.
        path: A .safetensors file; an old one is replaced once the new one is whole.
        metadata: What else is known of it, such as `method`, `encoder`, `mean`, `std`, `input_size`, `scores`.
        weights: State to save in place of the encoder's own.

    Returns:
        The metadata as it was saved.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"`path` must end in .safetensors, by which timm knows the format, got {path}.")
    config = {
        "timm_name": getattr(encoder, "timm_name", None),
        "timm_kwargs": getattr(encoder, "timm_kwargs", {}),
        "position_mode": getattr(encoder, "position_mode", None),
        "class": f"{type(encoder).__module__}.{type(encoder).__qualname__}",
        "loader": getattr(encoder, "loader", None),
        **(metadata or {}),
        "versions": {"ssl_distill": ssl_distill.__version__, "torch": torch.__version__, "timm": version("timm")},
    }
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    state = encoder.state_dict() if weights is None else weights
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", _KEY: json.dumps(config, default=str)})
    return config


def export_method(
    method: Any,
    path: str | Path,
    encoder: str | None = None,
    scores: Mapping[str, float] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Save one encoder of a method with all that is needed to use it.

    Args:
        method: A `Distiller`.
        path: As in `export_backbone`.
        encoder: Which of `method.encoders()`; None takes the one with the best score, else the first.
        scores: Latest values of `val/<encoder>/<metric>`.
        weights: State of the method, such as a checkpoint's, to save in place of its own.

    Returns:
        The metadata as it was saved.

    Raises:
        ValueError: If there is no such encoder, or none is named and the method trains several models.
    """
    name = choose_encoder(method, encoder, scores)
    module = method.encoders()[name]
    if weights is not None:
        weights = _part(weights, next(place for place, each in method.named_modules() if each is module))
    return export_backbone(module, path, describe_encoder(method, name, scores), weights)


def describe_encoder(method: Any, name: str, scores: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Where an encoder comes from, how its inputs are normalised, what it scored."""
    mean, std = method.normalization
    pretrained_size = getattr(method.encoders()[name], "pretrained_cfg", {}).get("input_size", (3, None, None))
    size = getattr(method.augment, "global_size", pretrained_size[-1])
    return {
        "method": f"{type(method).__module__}.{type(method).__qualname__}",
        "encoder": name,
        "mean": list(mean),
        "std": list(std),
        "input_size": [3, size, size],
        "scores": {key: value for key, value in (scores or {}).items() if key.startswith(f"val/{name}/")},
    }


def models_of(method: Any) -> list[list[str]]:
    """Names of a method's encoders, model by model: those of one model are the same network in different states."""
    models: list[list[str]] = method.models() if hasattr(method, "models") else [list(method.encoders())]
    return models


def choose_encoder(method: Any, encoder: str | None = None, scores: Mapping[str, float] | None = None) -> str:
    """The encoder that is asked for, else the better one of the only model.

    Raises:
        ValueError: If there is no such encoder, or none is named and the method trains several models.
    """
    names = ", ".join(method.encoders())
    if encoder is not None and encoder not in method.encoders():
        raise ValueError(f"`encoder` must be one of {names}, got {encoder}.")
    models = models_of(method)
    if encoder is None and len(models) > 1:
        raise ValueError(
            f"`encoder` must be named, since {type(method).__name__} trains {len(models)} models: {names}."
        )
    return encoder or better_encoder(models[0], scores or {})


def better_encoder(names: Sequence[str], scores: Mapping[str, float]) -> str:
    """The encoder with the highest accuracy, by the first measure that all have; the first where there is none."""
    for metric in _DECISIVE:
        if all(f"val/{name}/{metric}" in scores for name in names):
            return max(names, key=lambda name: scores[f"val/{name}/{metric}"])
    return names[0]


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `export_backbone` saved beside the weights.

    Raises:
        ValueError: If the file is none of ours.
    """
    if not Path(path).is_file():
        raise ValueError(f"`path` {path} does not exist; give a backbone.safetensors that ssl-distill exported.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # safetensors has its own error type, not exported in a stable place
        raise ValueError(f"`path` {path} is no safetensors file, or was cut off ({error}).") from error
    if _KEY not in metadata:
        raise ValueError(f"`path` {path} was not exported by ssl-distill: it does not say which network it is.")
    config: dict[str, Any] = json.loads(metadata[_KEY])
    return config


def load_backbone(path: str | Path, features_only: bool = False, module: nn.Module | None = None) -> nn.Module:
    """The backbone of an exported file, in eval mode.

    Args:
        path: A file that `export_backbone` wrote.
        features_only: The backbone as timm's feature extractor: maps at several reductions instead of features.
        module: The network to load into, for an encoder that was the user's own module.

    Returns:
        The module. Its attribute `backbone_config` is the metadata: `mean`, `std`, `input_size`, `scores` and more.

    Raises:
        ValueError: If the file is none of ours, or the network cannot be made from what it says.
    """
    config = read_metadata(path)
    name, kwargs = config["timm_name"], config["timm_kwargs"]
    if module is None and name is None:
        raise ValueError(f"{path} holds a {config['class']}, which timm cannot make; pass one as `module`.")
    if module is None and (foreign := [key for key in kwargs if key in _LOADING] or [name][: ":" in name]):
        raise ValueError(f"`path` {path} asks timm for weights from elsewhere ({foreign[0]}); it must hold its own.")
    if module is not None:
        if features_only:
            raise ValueError("`features_only` needs one of timm's networks; a `module` gives what it gives.")
        module.load_state_dict(load_file(path))
    elif features_only:
        # As pretrained weights from a file: timm loads those before it cuts the network up.
        overlay = {"file": str(path), "num_classes": 0}
        any_size: dict[str, Any] = {"dynamic_img_size": True} if config["position_mode"] else {}
        module = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, **any_size, **kwargs
        )
    else:
        mode = {"position_mode": config["position_mode"]} if config["position_mode"] else {}
        module = create_backbone(name, **mode, **kwargs)
        module.load_state_dict(load_file(path))
    module.backbone_config = config  # type: ignore[assignment]
    return module.eval()


def loading_lines(path: str | Path) -> list[str]:
    """Python that loads an exported file, one line with this package and one with timm if timm can."""
    config = read_metadata(path)
    file = quoted(path)
    if config.get("loader"):
        module, _, function = config["loader"].rpartition(".")
        return [f"from {module} import {function}; backbone = {function}({file})"]
    if config["timm_name"] is None:
        return [f"import ssl_distill; backbone = ssl_distill.load_backbone({file}, module=...)"]
    ours = f"import ssl_distill; backbone = ssl_distill.load_backbone({file})"
    modules = "timm, ssl_distill.backbones.presets" if config["timm_name"] in presets.default_cfgs else "timm"
    kwargs = "".join(f", {key}={value!r}" for key, value in config["timm_kwargs"].items())
    call = f'timm.create_model("{config["timm_name"]}", num_classes=0{kwargs}, checkpoint_path={file})'
    return [ours, f"import {modules}; backbone = {call}"]


def quoted(path: str | Path) -> str:
    """A path as Python writes it in a source."""
    return json.dumps(str(path), ensure_ascii=False)


def _part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The state of one submodule."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
