"""What an encoder makes of every place of an image: features as colours, and where a class token looks."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from ssl_distill.evaluate.features import encode

_FEWEST_CELLS = 7  # per side of a map that still shows something: what ResNets leave of 224 px
_RANGE = 2.5  # standard deviations from the mean of a component to the end of its colour channel


class ImageMaps(NamedTuple):
    """Maps of a batch of images.

    Attributes:
        features: Patch tokens after the final norm, or a map of a ConvNet.
        attention: How much the class token attends to each patch in the last block, mean over heads; None without one.
    """

    features: Float[Tensor, "B D h w"]
    attention: Float[Tensor, "B h w"] | None


def image_maps(encoder: nn.Module, images: Float[Tensor, "B 3 H W"]) -> ImageMaps | None:
    """Maps in one pass of a frozen encoder; None if it is no network of timm's kind.

    Of a ConvNet the deepest map with at least 7 x 7 cells is taken, or else the largest: the last map of a small image
    has hardly any places left.
    """
    names = _map_modules(encoder)
    if not names:
        return None
    outputs: dict[str, Tensor] = {}
    attention: list[Tensor] = []
    hooks = [
        encoder.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.__setitem__(name, output)
        )
        for name in names
    ]
    attend = _last_attention(encoder)
    if attend is not None:
        hooks.append(
            attend.register_forward_hook(lambda module, args, output: attention.append(_class_row(module, args[0])))
        )
    try:
        encode(encoder, images)
    finally:
        for hook in hooks:
            hook.remove()
    maps = [_as_map(encoder, outputs[name], images) for name in names if name in outputs]
    if not maps:
        return None
    enough = [each for each in maps if min(each.shape[2:]) >= _FEWEST_CELLS]
    features = enough[-1] if enough else maps[0]
    if not attention:
        return ImageMaps(features, None)
    grid = (features.shape[2], features.shape[3])
    return ImageMaps(features, attention[0][:, _num_prefix_tokens(encoder) :].unflatten(1, grid))


def pca_colors(
    features: Float[Tensor, "B D h w"], previous: UInt8[Tensor, "B 3 h w"] | None = None
) -> UInt8[Tensor, "B 3 h w"]:
    """The three main components over all places of all images as red, green and blue; grey where nothing varies.

    Args:
        features: Of any scale.
        previous: Colours of the same images before. Components are free up to a rotation; that which comes nearest to
            these colours is taken, so that a place changes its colour only if its features change.
    """
    rows = features.float().cpu().movedim(1, -1)  # (B, h, w, D)
    places, rows = rows.shape[:-1], rows.flatten(0, 2)
    floor = 1e-4 * rows.square().mean().sqrt().clamp(min=1e-12) * rows.shape[1] ** 0.5
    left, strength, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    scores = rows.new_zeros(len(rows), 3)
    kept = min(3, len(strength))
    deviation = strength[:kept] / len(rows) ** 0.5
    scores[:, :kept] = left[:, :kept] * strength[:kept] / deviation.clamp(min=floor)
    if previous is not None and previous.shape == (places[0], 3, *places[1:]):
        before = previous.float().movedim(1, -1).flatten(0, 2) - 127.5
        u, _, v = torch.linalg.svd(scores.T @ before)
        scores = scores @ (u @ v)
    colors = (127.5 + 127.5 / _RANGE * scores).clamp(0, 255).byte()
    return colors.unflatten(0, places).movedim(-1, 1).contiguous()


def _map_modules(encoder: Any) -> list[str]:
    """Names of the modules whose outputs are maps, from the first to the last."""
    if hasattr(encoder, "blocks") and hasattr(encoder, "norm") and hasattr(encoder, "patch_embed"):
        return ["norm"]
    info = getattr(encoder, "feature_info", None)
    return [entry["module"] for entry in info] if isinstance(info, list) else []


def _as_map(encoder: Any, output: Tensor, images: Tensor) -> Float[Tensor, "B D h w"]:
    if output.ndim == 3:
        rows, columns = encoder.patch_embed.patch_size
        grid = (images.shape[2] // rows, images.shape[3] // columns)
        return output[:, _num_prefix_tokens(encoder) :].transpose(1, 2).unflatten(2, grid)
    return output.permute(0, 3, 1, 2) if getattr(encoder, "output_fmt", "NCHW") == "NHWC" else output


def _last_attention(encoder: Any) -> nn.Module | None:
    """timm's plain attention of the last block, if there is a class token to look through."""
    blocks = getattr(encoder, "blocks", None)
    attend = getattr(blocks[-1], "attn", None) if isinstance(blocks, nn.Sequential | nn.ModuleList) else None
    return attend if isinstance(attend, Attention) and getattr(encoder, "cls_token", None) is not None else None


def _class_row(attend: Any, tokens: Float[Tensor, "B S D"]) -> Float[Tensor, "B S"]:
    """Attention of the first token to all, from what its module was given; the fused kernel does not tell."""
    query, key, _ = attend.qkv(tokens).unflatten(-1, (3, attend.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    scores = attend.q_norm(query)[:, :, :1] * attend.scale @ attend.k_norm(key).transpose(2, 3)
    row: Tensor = scores.float().softmax(-1)[:, :, 0].mean(1)
    return row


def _num_prefix_tokens(encoder: Any) -> int:
    return int(getattr(encoder, "num_prefix_tokens", 0))
