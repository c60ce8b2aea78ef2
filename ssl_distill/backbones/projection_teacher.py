"""Frozen teachers with a projection head, out of checkpoints, as maps of projections."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.maps import image_features
from ssl_distill.heads.dense import SpatialAdaptor
from ssl_distill.reading.tensors import load_tensors


class Layout(NamedTuple):
    """Where a kind of checkpoint keeps what is needed.

    Attributes:
        kind: Whose checkpoints these are.
        entry: Key of the weights in the file; empty if the file is the weights.
        backbone: Prefix of the backbone's weights.
        head: Prefix of the projection head's layers, whose next part is the layer's number.
        activation: What stands between the head's layers; it has no weights.
    """

    kind: str
    entry: str
    backbone: str
    head: str
    activation: type[nn.Module]


LAYOUTS = (
    Layout("MoCo v3 ResNet", "state_dict", "module.momentum_encoder.", "module.momentum_encoder.fc.", nn.ReLU),
    Layout("MoCo v3 ViT", "state_dict", "module.momentum_encoder.", "module.momentum_encoder.head.", nn.ReLU),
    Layout("BYOL", "model", "module.target_encoder.", "module.target_encoder.fc.", nn.ReLU),
    Layout("SwAV", "", "module.", "module.projection_head.", nn.ReLU),
    Layout("Barlow Twins", "model", "module.backbone.", "module.projector.", nn.ReLU),
    Layout("ssl-distill DINO", "state_dict", "teacher.backbone.", "teacher.head.mlp.", nn.GELU),
)


class ProjectionTeacher(nn.Module):
    """A frozen backbone and its projection head, at every place of the map. Always in eval mode.

    Args:
        backbone: As `image_features` takes it; its pooled map is what the head was trained on.
        head: Vector head that `SpatialAdaptor` can convert.

    Shape: images (B, 3, H, W) to maps (B, C, h, w).
    """

    def __init__(self, backbone: nn.Module, head: nn.Sequential) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = SpatialAdaptor(head)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "ProjectionTeacher":
        """Stays in eval mode: batch statistics would break the adaptor, and change with every batch."""
        return super().train(False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Projections at every place."""
        projections: Tensor = self.head(image_features(self.backbone, images).map)
        return projections


def read_projection_teacher(
    checkpoint: str | Path, backbone: str = "resnet50", backbone_kwargs: Mapping[str, Any] | None = None
) -> ProjectionTeacher:
    """A teacher from a checkpoint of MoCo v3, BYOL, SwAV, Barlow Twins, or of our own DINO runs.

    A last batch norm without weights (MoCo v3's) is left out, as are predictors and prototypes.

    Args:
        checkpoint: A file for `torch.load`.
        backbone: timm name of the network that it holds.
        backbone_kwargs: Further arguments of the timm model, such as `img_size`.

    Raises:
        ValueError: If there is no such file, no projection head in it, statistics are missing, or the backbone is
            another than the checkpoint's.
    """
    if not Path(checkpoint).is_file():
        raise ValueError(f"`teacher` {checkpoint} does not exist; give a checkpoint with a projection head.")
    content = load_tensors(checkpoint, "teacher")
    layout, state = _layout_of(content, checkpoint)
    network = create_backbone(backbone, **(backbone_kwargs or {}))
    _load_backbone(network, state, layout, f"`teacher` {checkpoint} ({layout.kind}) does not fit {backbone}")
    layers = {key.removeprefix(layout.head): value for key, value in state.items() if key.startswith(layout.head)}
    return ProjectionTeacher(network, head_of(layers, layout.activation))


def head_of(state: Mapping[str, Tensor], activation: type[nn.Module]) -> nn.Sequential:
    """A projection head from its weights, by number of layer: `0.weight`, `1.running_mean`, and so on.

    Numbers without weights are activations. A last batch norm without weights is left out.

    Raises:
        ValueError: If a batch norm lacks its statistics.
    """
    numbers = sorted({int(key.partition(".")[0]) for key in state})
    layers = {number: _layer(number, state) for number in numbers}
    if not getattr(layers[numbers[-1]], "affine", True):
        numbers.pop()
    return nn.Sequential(*(layers.get(number) or activation() for number in range(numbers[-1] + 1)))


def _layer(number: int, state: Mapping[str, Tensor]) -> nn.Module:
    of_layer = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{number}.")}
    weight = of_layer.get("weight")
    layer: nn.Module
    if weight is not None and weight.ndim == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in of_layer)
    else:
        missing = [name for name in ("running_mean", "running_var") if name not in of_layer]
        if missing:
            raise ValueError(
                f"`teacher` must have batch-norm statistics; layer {number} of its head lacks {missing[0]}."
            )
        layer = nn.BatchNorm1d(len(of_layer["running_mean"]), affine=weight is not None)
        of_layer.setdefault("num_batches_tracked", torch.tensor(0))
    layer.load_state_dict(of_layer)
    return layer


def _layout_of(content: Mapping[str, Any], checkpoint: str | Path) -> tuple[Layout, Mapping[str, Tensor]]:
    for layout in LAYOUTS:
        state = content.get(layout.entry) if layout.entry else content
        if isinstance(state, Mapping) and any(str(key).startswith(layout.head) for key in state):
            return layout, state
    kinds = ", ".join(layout.kind for layout in LAYOUTS)
    raise ValueError(f"`teacher` {checkpoint} has no projection head; known are checkpoints of {kinds}.")


def _load_backbone(network: nn.Module, state: Mapping[str, Tensor], layout: Layout, misfit: str) -> None:
    theirs = {
        key.removeprefix(layout.backbone): value
        for key, value in state.items()
        if key.startswith(layout.backbone) and not key.startswith((layout.head, "module.prototypes"))
    }
    ours = network.state_dict()
    for problem in _problems(theirs, ours):
        raise ValueError(f"{misfit}: {problem}.")
    network.load_state_dict(theirs, strict=False)


def _problems(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> Iterator[str]:
    for name in ours:
        if name not in theirs and not name.endswith("num_batches_tracked"):
            yield f"it lacks {name}"
    for name, value in theirs.items():
        if name not in ours:
            yield f"it has {name}, which this backbone has not"
        elif value.shape != ours[name].shape:
            yield f"{name} is {tuple(value.shape)} there and {tuple(ours[name].shape)} here"
