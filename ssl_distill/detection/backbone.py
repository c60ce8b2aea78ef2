"""Trained backbones under torchvision's detectors."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
from jaxtyping import Float
from timm.layers import LayerNorm2d
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ssl_distill.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD
from ssl_distill.backbones.create import create_backbone
from ssl_distill.export import load_backbone

Norm = Literal["frozen", "sync", "train"]
_NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen": freeze_batch_norm_2d,
    "sync": nn.SyncBatchNorm.convert_sync_batchnorm,
    "train": lambda module: module,
}
_NUM_LEVELS = 4


class PyramidBackbone(nn.Module):
    """Maps of a backbone through a pyramid, as torchvision's detectors take them.

    Args:
        body: Images to a list of maps, the finest first.
        pyramid: Maps by name to maps of `out_channels` by name.
        out_channels: Channels of every map.
        reductions: Pixels of the image per place of each map, but for "pool".
        mean: That inputs are normalised with, for the detector's `image_mean`.
        std: The same for its `image_std`.
    """

    def __init__(
        self,
        body: nn.Module,
        pyramid: nn.Module,
        out_channels: int,
        reductions: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.body = body
        self.pyramid = pyramid
        self.out_channels = out_channels
        self.reductions = [*reductions, 2 * reductions[-1]]
        self.image_mean = list(mean)
        self.image_std = list(std)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> OrderedDict[str, Tensor]:
        """Maps "0", "1", ... from fine to coarse, and "pool"."""
        maps = self.body(images)
        pyramid: OrderedDict[str, Tensor] = self.pyramid(OrderedDict((str(i), each) for i, each in enumerate(maps)))
        return pyramid


def backbone_with_fpn(
    path_or_name: str | Path,
    out_channels: int = 256,
    levels: Sequence[int] | None = None,
    trainable_layers: int | None = None,
    norm: Norm = "frozen",
    **kwargs: Any,
) -> PyramidBackbone:
    """A backbone for torchvision's Faster R-CNN, Mask R-CNN or RetinaNet.

    Hand `image_mean=backbone.image_mean` and `image_std=backbone.image_std` to the detector.

    Args:
        path_or_name: File that `ssl-distill export` wrote, or a timm name, with random weights unless `pretrained`.
        out_channels: Channels of every map.
        levels: Reductions of the maps, from fine to coarse; None is the last four of a ConvNet, and 4, 8, 16, 32 of a
            plain ViT with patches of 16 (a quarter of the patch size to twice).
        trainable_layers: Last stages (ConvNet) or blocks (ViT) that are trained; None trains all.
        norm: What becomes of the backbone's batch norms: "frozen" statistics and weights, "sync" over ranks (needs
            GPUs), or "train" as they are.
        **kwargs: Further arguments of the timm model, for a name.

    Returns:
        Feature pyramid on a ConvNet, simple feature pyramid on a plain ViT.

    Raises:
        ValueError: If the backbone has no such levels or layers, or `norm` is unknown.

    Source: FPN (arXiv 1612.03144); ViTDet (arXiv 2203.16527), section 3.
    """
    if norm not in _NORMS:
        raise ValueError(f"`norm` must be one of {', '.join(_NORMS)}, got {norm!r}.")
    body, mean, std = _body(path_or_name, kwargs)
    reductions: list[int] = body.feature_info.reduction()
    channels: list[int] = body.feature_info.channels()
    if hasattr(getattr(body, "model", None), "blocks"):  # a plain ViT: maps of several blocks, all of one size
        stride = reductions[-1]
        levels = levels or [stride // 4, stride // 2, stride, stride * 2]
        _freeze_vit(body, trainable_layers)
        body = LastMap(_NORMS[norm](body))
        pyramid: nn.Module = SimpleFeaturePyramid(channels[-1], out_channels, stride, levels)
        return PyramidBackbone(body, pyramid, out_channels, levels, mean, std)
    levels = levels or sorted(set(reductions))[-_NUM_LEVELS:]
    missing = [level for level in levels if level not in reductions]
    if missing:
        raise ValueError(f"`levels` must be among the backbone's reductions {reductions}, got {missing[0]}.")
    last_with = {reduction: i for i, reduction in enumerate(reductions)}
    chosen = [last_with[level] for level in levels]
    _freeze_stages(body, trainable_layers)
    body = ChosenMaps(_NORMS[norm](body), chosen)
    pyramid = FeaturePyramidNetwork([channels[i] for i in chosen], out_channels, extra_blocks=LastLevelMaxPool())
    return PyramidBackbone(body, pyramid, out_channels, levels, mean, std)


def _body(path_or_name: str | Path, kwargs: dict[str, Any]) -> tuple[Any, Sequence[float], Sequence[float]]:
    """timm's feature extractor, and what images are normalised with."""
    if Path(path_or_name).suffix == ".safetensors":
        body: Any = load_backbone(path_or_name, features_only=True)
        config = body.backbone_config
        return body.train(), config["mean"], config["std"]
    name = str(path_or_name)
    plain = create_backbone(name, **{key: value for key, value in kwargs.items() if key != "pretrained"})
    any_size: dict[str, Any] = {"dynamic_img_size": True} if hasattr(plain, "position_mode") else {}
    body = timm.create_model(name, features_only=True, **any_size, **kwargs)
    config = getattr(plain, "pretrained_cfg", {})
    return body, config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)


class ChosenMaps(nn.Module):
    """Some of a feature extractor's maps.

    Args:
        body: Images to maps.
        chosen: Their positions.
    """

    def __init__(self, body: nn.Module, chosen: Sequence[int]) -> None:
        super().__init__()
        self.body = body
        self.chosen = tuple(chosen)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """Chosen maps, in order."""
        maps = self.body(images)
        return [maps[i] for i in self.chosen]


class LastMap(ChosenMaps):
    """The last of a feature extractor's maps."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body, [-1])


class SimpleFeaturePyramid(nn.Module):
    """A pyramid from a plain ViT's only map: transposed convolutions for finer levels, pooling for coarser ones.

    Args:
        in_dim: Channels of the map.
        out_channels: Channels of every level.
        stride: Reduction of the map: the patch size.
        levels: Reductions of the pyramid; each is the stride times or over a power of two.

    Source: ViTDet (arXiv 2203.16527), section 3.
    """

    def __init__(self, in_dim: int, out_channels: int, stride: int, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_level(in_dim, out_channels, stride, level) for level in levels)
        self.coarser = LastLevelMaxPool()

    def forward(self, maps: OrderedDict[str, Float[Tensor, "B D h w"]]) -> OrderedDict[str, Tensor]:
        """Levels "0", "1", ... and "pool"."""
        (feature_map,) = maps.values()
        made = [level(feature_map) for level in self.levels]
        made, names = self.coarser(made, made, [str(i) for i in range(len(made))])
        return OrderedDict(zip(names, made, strict=True))


def _level(in_dim: int, out_channels: int, stride: int, level: int) -> nn.Sequential:
    doublings = math.log2(stride / level)
    if not doublings.is_integer() or doublings > math.log2(in_dim):
        raise ValueError(f"`levels` must be {stride} times or over a power of two for this backbone, got {level}.")
    layers: list[nn.Module] = []
    width = in_dim
    for i in range(int(doublings)):
        layers += [*([LayerNorm2d(width), nn.GELU()] if i else []), nn.ConvTranspose2d(width, width // 2, 2, 2)]
        width //= 2
    if doublings < 0:
        layers.append(nn.MaxPool2d(2 ** int(-doublings)))
    layers += [nn.Conv2d(width, out_channels, 1, bias=False), LayerNorm2d(out_channels)]
    return nn.Sequential(*layers, nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False), LayerNorm2d(out_channels))


def _freeze_stages(body: Any, trainable_layers: int | None) -> None:
    """Freeze all modules of a ConvNet up to the stage before the last trainable ones."""
    stages: list[str] = body.feature_info.module_name()
    _check_layers(trainable_layers, len(stages), "stages")
    if trainable_layers is None or trainable_layers == len(stages):
        return
    last_frozen = stages[-1 - trainable_layers].replace(".", "_")
    for name, module in body.named_children():
        module.requires_grad_(False)
        if name == last_frozen:
            return
    raise AssertionError(f"no module {last_frozen} in {type(body).__name__}")


def _freeze_vit(body: Any, trainable_layers: int | None) -> None:
    """Freeze the embedding and all but the last blocks of a ViT."""
    blocks = list(body.model.blocks)
    _check_layers(trainable_layers, len(blocks), "blocks")
    if trainable_layers is None:
        return
    body.requires_grad_(False)
    for block in blocks[len(blocks) - trainable_layers :]:
        block.requires_grad_(True)


def _check_layers(trainable_layers: int | None, count: int, kind: str) -> None:
    if trainable_layers is not None and not 0 <= trainable_layers <= count:
        raise ValueError(f"`trainable_layers` must lie in 0 to {count}, the backbone's {kind}, got {trainable_layers}.")
