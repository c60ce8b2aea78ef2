"""Vision transformers out of the checkpoints that papers released."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssl_distill.backbones.position import resize_position_embedding
from ssl_distill.backbones.vit import VisionTransformer

_ANCHOR = "patch_embed.proj.weight"
_NOT_ENCODER = ("decoder_", "mask_token", "masked_embed", "head.")


def load_official_vit(backbone: VisionTransformer, checkpoint: Mapping[str, Any], branch: str = "teacher") -> None:
    """Load the weights of a DINO, iBOT, UDI, MAE or dBOT checkpoint, or of one of ours.

    Networks nested by name and any prefix of the keys are found; heads, decoders and mask tokens are left out; position
    embeddings are resized by the backbone's own rule where its grid is another.

    Args:
        backbone: Made with the sizes of the checkpoint.
        checkpoint: What `torch.load` gave.
        branch: Which network, where there are several.

    Raises:
        ValueError: If the network is not found, or its weights are not the backbone's.
    """
    load_exactly(backbone, _resize_positions(_split_class_tokens(_encoder_state(checkpoint, branch)), backbone))


def load_exactly(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights of which none is missing, left over or of another size.

    Raises:
        ValueError: If one is; names it.
    """
    expected = network.state_dict()
    for problem, names in {
        "lacks": sorted(expected.keys() - state.keys()),
        "has unknown": sorted(state.keys() - expected.keys()),
        "has another shape of": sorted(
            k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape
        ),
    }.items():
        if names:
            raise ValueError(f"`checkpoint` does not fit the network: it {problem} {_shortened(names)}.")
    network.load_state_dict(state)


def _encoder_state(checkpoint: Mapping[str, Any], branch: str) -> dict[str, Tensor]:
    """The encoder's weights by timm's names."""
    nested = {name: value for name, value in checkpoint.items() if isinstance(value, Mapping) and _anchors(value)}
    if nested and not _anchors(checkpoint):
        network = branch if branch in nested else next(iter(nested))
        if len(nested) > 1 and network != branch:
            raise ValueError(f"`branch` must be one of {', '.join(nested)} for this checkpoint, got {branch!r}.")
        checkpoint = nested[network]
    prefixes = _anchors(checkpoint)
    if len(prefixes) > 1:
        prefixes = [prefix for prefix in prefixes if branch in prefix.split(".")]
    if len(prefixes) != 1:
        raise ValueError(
            f"`checkpoint` must have one ViT of branch {branch!r}, found {len(prefixes)}; "
            f"its keys are {_shortened(list(checkpoint))}."
        )
    return {
        name.removeprefix(prefixes[0]): value
        for name, value in checkpoint.items()
        if name.startswith(prefixes[0]) and not name.removeprefix(prefixes[0]).startswith(_NOT_ENCODER)
    }


def _anchors(state: Mapping[str, Any]) -> list[str]:
    """Prefixes of all ViTs in a state dict."""
    return [name.removesuffix(_ANCHOR) for name in state if str(name).endswith(_ANCHOR)]


def _split_class_tokens(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """UDI keeps all class tokens in one parameter, timm all but the first with the registers."""
    tokens = state.get("cls_token", torch.empty(1, 1, 0))
    if tokens.shape[1] == 1:
        return state
    return {**state, "cls_token": tokens[:, :1], "reg_token": tokens[:, 1:]}


def _resize_positions(state: dict[str, Tensor], backbone: VisionTransformer) -> dict[str, Tensor]:
    positions, native = state.get("pos_embed"), backbone.pos_embed
    if positions is None or native is None or positions.shape == native.shape:
        return state
    num_prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    side = round((positions.shape[1] - num_prefix) ** 0.5)
    if num_prefix + side**2 != positions.shape[1]:
        return state  # no square grid behind these prefix tokens: refused as another shape
    grid_to = backbone.patch_embed.grid_size
    resized = resize_position_embedding(positions, (side, side), grid_to, num_prefix, backbone.position_mode)
    return {**state, "pos_embed": resized}


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
