"""Published WaffleIron and ScaLR checkpoints, and our own exported backbones, as networks."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssl_distill.export import read_metadata
from ssl_distill.lidar.waffleiron import WaffleIron
from ssl_distill.reading.tensors import load_tensors

_NAMES = (  # theirs, ours
    (r"embed\.norm\.", "embedding.norm."),
    (r"embed\.conv1\.", "embedding.point."),
    (r"embed\.conv2\.", "embedding.neighbor."),
    (r"embed\.final\.", "embedding.merge."),
    (r"waffleiron\.spatial_mix\.(\d+)\.ffn\.", r"layers.\1.spatial.convs."),
    (r"waffleiron\.spatial_mix\.(\d+)\.", r"layers.\1.spatial."),
    (r"waffleiron\.channel_mix\.(\d+)\.", r"layers.\1.channel."),
)
_ENTRIES = ("model_point", "model_points", "net")  # where a published file keeps its weights


def our_name(name: str) -> str:
    """A published parameter's name in `WaffleIron`; heads, `classif.*`, keep theirs."""
    name = name.removeprefix("module.")
    for theirs, ours in _NAMES:
        name = re.sub(f"^{theirs}", ours, name)
    return name.replace(".scale.weight", ".scale")


def load_official(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy published weights; their convolutions over single points are our linear layers.

    Args:
        network: A `WaffleIron`, or a part or an extension of one.
        state: Weights by published name; `module.` in front and heads that the network lacks are left out.

    Raises:
        ValueError: If a weight of the network is missing, or of another size.
    """
    theirs = {our_name(name): value for name, value in state.items()}
    ours = network.state_dict()
    for name, value in ours.items():
        if name not in theirs:
            raise ValueError(f"`state` must hold all weights of the network; it lacks {name}.")
        if theirs[name].numel() != value.numel():
            raise ValueError(f"`state` has {name} of shape {tuple(theirs[name].shape)}, not {tuple(value.shape)}.")
    network.load_state_dict({name: theirs[name].reshape(value.shape) for name, value in ours.items()})


def read_official(path: str | Path) -> dict[str, Tensor]:
    """The weights in a published checkpoint.

    Raises:
        ValueError: If there are none.
    """
    content: Any = load_tensors(path, "path")
    for entry in _ENTRIES:
        if entry in content:
            return dict(content[entry])
    raise ValueError(f"{path} has none of {', '.join(_ENTRIES)}; is it a checkpoint of WaffleIron or ScaLR?")


def load_waffleiron(path: str | Path, **kwargs: Any) -> WaffleIron:
    """The backbone of a file that `export_backbone` wrote, in eval mode.

    Args:
        path: The .safetensors file.
        **kwargs: Arguments of `WaffleIron` that are to differ, such as `grids` of another field of view with cells of
            the same size, or `drop_path_rate`.
    """
    config = read_metadata(path)
    arguments = config["timm_kwargs"]
    if "channels" not in arguments:
        raise ValueError(f"`path` {path} holds a {config['class']}, not a WaffleIron.")
    parts = {name: _layer(arguments[name], path) for name in ("norm", "activation")}
    network = WaffleIron(**{**arguments, **parts, **kwargs})
    network.load_state_dict(load_tensors(path, "path"))
    return network.eval()


def _layer(name: str, path: str | Path) -> type[nn.Module]:
    """A class of torch.nn; whatever else a file may name is not imported."""
    layer = getattr(nn, name.rpartition(".")[2], None)
    if not isinstance(layer, type) or f"{layer.__module__}.{layer.__qualname__}" != name:
        raise ValueError(f"`path` {path} names {name}, which is no layer of torch.nn.")
    return layer
