"""What any timm backbone sees in an image, as a vector and as a map."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_distill.evaluate.features import evaluating


class ImageFeatures(NamedTuple):
    """Features of a batch of images.

    Attributes:
        vector: What the backbone returns when it is called; E is D but for a few mobile networks.
        summary: The map in one vector: the class token where there is one, else the mean over places.
        map: Features by place; patch tokens row by row.
    """

    vector: Float[Tensor, "B E"]
    summary: Float[Tensor, "B D"]
    map: Float[Tensor, "B D h w"]


def image_features(backbone: Any, images: Float[Tensor, "B 3 H W"]) -> ImageFeatures:
    """Vector and map in one pass.

    Args:
        backbone: ConvNet or transformer with timm's `forward_features` and `forward_head`, as `check_maps` wants it.
        images: Normalised.
    """
    return _by_place(backbone, backbone.forward_features(images), images)


def _by_place(backbone: Any, features: Tensor, images: Tensor) -> ImageFeatures:
    vector = backbone.forward_head(features, pre_logits=True)
    if features.ndim == 3:
        prefix, patches = features.tensor_split([backbone.num_prefix_tokens], dim=1)
        rows, columns = backbone.patch_embed.patch_size
        grid = (images.shape[2] // rows, images.shape[3] // columns)
        summary = prefix[:, 0] if prefix.shape[1] else patches.mean(1)
        return ImageFeatures(vector, summary, patches.transpose(1, 2).unflatten(2, grid))
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
        features = features.permute(0, 3, 1, 2)
    return ImageFeatures(vector, features.mean((2, 3)), features)


class FeatureSizes(NamedTuple):
    """Sizes of a backbone's features.

    Attributes:
        vector_dim: E.
        map_dim: D.
        grid: Rows and columns of the map.
        is_tokens: Whether the map is a transformer's patch tokens.
    """

    vector_dim: int
    map_dim: int
    grid: tuple[int, int]
    is_tokens: bool


@torch.no_grad()
def feature_sizes(backbone: nn.Module, image_size: int) -> FeatureSizes:
    """Sizes for square images of `image_size` pixels, by trying.

    Raises:
        ValueError: If the backbone gives no map.
    """
    for name in ("forward_features", "forward_head"):
        if not hasattr(backbone, name):
            raise ValueError(f"`backbone` must have `{name}`, as timm's models, got {type(backbone).__name__}.")
    parameter = next(backbone.parameters())
    with evaluating(backbone):
        images = parameter.new_zeros(1, 3, image_size, image_size)
        output = backbone.forward_features(images)  # type: ignore[operator]
        features = _by_place(backbone, output, images)
    rows, columns = features.map.shape[2:]
    return FeatureSizes(features.vector.shape[1], features.map.shape[1], (rows, columns), output.ndim == 3)
