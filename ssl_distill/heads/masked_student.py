"""Encoder and decoder as one student, and how it starts from scratch."""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from timm.layers import DropPath
from torch import Tensor, nn

from ssl_distill.backbones.vit import VisionTransformer
from ssl_distill.sharding import share


class MaskedStudent(nn.Module):
    """Predicts features of the patches that it does not see.

    Args:
        backbone: The encoder at its deepest; it gets the fixed sine-cosine positions.
        decoder: From its tokens to features, such as `FeatureDecoder`.

    Raises:
        ValueError: If the backbone is no plain ViT with exactly one class token.
    """

    def __init__(self, backbone: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.backbone = check_masked_backbone(backbone)
        self.backbone.fix_sincos_positions()
        self.decoder = decoder
        self.depth = len(self.backbone.blocks)
        self.drop_path_rate = max((each.drop_prob for each in _drop_paths(self.backbone)), default=0.0)

    def forward(
        self, images: Float[Tensor, "B 3 H W"], kept: Int[Tensor, "B Nk"], wanted: Int[Tensor, "B M"]
    ) -> Float[Tensor, "B _ F"]:
        """Features of the class token and of the wanted patches; the encoder computes on the kept ones only."""
        predictions: Tensor = self.decoder(self.encoder.tokens(images, keep=kept), kept, wanted)
        for parameter in self.backbone.blocks[self.depth :].parameters():
            predictions = predictions + 0 * share(parameter).sum()  # a gradient of 0: DDP would wait for none
        return predictions

    @property
    def encoder(self) -> VisionTransformer:
        """The backbone as deep as it is now; its weights are shared, not copied."""
        return first_blocks(self.backbone, self.depth)

    def set_depth(self, depth: int) -> None:
        """Use the first `depth` blocks only, and let stochastic depth grow over these.

        The others stay in place, so that optimiser, checkpoints and ranks see the same parameters at any depth.
        """
        if depth == self.depth:
            return
        self.depth = depth
        rates = torch.linspace(0, self.drop_path_rate, depth).tolist()
        for block, rate in zip(self.backbone.blocks[:depth], rates, strict=True):
            for drop_path in _drop_paths(block):
                drop_path.drop_prob = rate

    def get_extra_state(self) -> Tensor:
        """The depth: what a checkpoint must tell besides the weights."""
        return torch.tensor(self.depth)

    def set_extra_state(self, state: Tensor) -> None:
        """The depth out of a checkpoint."""
        self.set_depth(int(state))


def first_blocks(backbone: VisionTransformer, depth: int) -> VisionTransformer:
    """The same network with its first blocks only, sharing their weights."""
    if depth == len(backbone.blocks):
        return backbone
    shallow: Any = copy.copy(backbone)
    shallow._modules = {**backbone._modules, "blocks": backbone.blocks[:depth]}
    shallow.timm_kwargs = {**getattr(backbone, "timm_kwargs", {}), "depth": depth}
    return shallow


def _drop_paths(network: nn.Module) -> list[DropPath]:
    return [module for module in network.modules() if isinstance(module, DropPath)]


def check_masked_backbone(backbone: nn.Module) -> VisionTransformer:
    """The backbone, if patches can be dropped from it and it has one class token.

    Raises:
        ValueError: If not.
    """
    if not isinstance(backbone, VisionTransformer):
        raise ValueError(
            f"`backbone` must be one of timm's plain ViTs, whose patches can be dropped, got"
            f" {type(backbone).__name__}; try vit_base_patch16_224."
        )
    if backbone.num_class_tokens != 1:
        raise ValueError(f"`backbone` must have one class token, got {backbone.num_class_tokens}.")
    return backbone


@torch.no_grad()
def start_afresh(network: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights anew, in place.

    Linear weights, and convolutions seen as linear, by Xavier's uniform law; biases 0; norms 1 and 0; tokens normal
    with deviation 0.02. The bias of the patch embedding gets torch's own law. Frozen parameters stay.

    Deviation: the official code keeps the bias of the patch embedding as it was trained; `start_afresh_but_bias` does.

    Args:
        network: A `MaskedStudent`, or any network of linear layers, convolutions and norms.
        generator: Of the CPU, whatever device the network is on: equal seeds give equal weights on all ranks.

    Source: dBOT (arXiv 2209.03917), its official code.
    """
    start_afresh_but_bias(network, generator)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            bound = module.weight[0].numel() ** -0.5
            _draw(module.bias, lambda bias, bound=bound: nn.init.uniform_(bias, -bound, bound, generator))


@torch.no_grad()
def start_afresh_but_bias(network: nn.Module, generator: torch.Generator) -> None:
    """The same, but the bias of a convolution is left as it is: the official code's law.

    Args:
        network: As for `start_afresh`.
        generator: As for `start_afresh`.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            _draw(module.weight.flatten(1), lambda weight: nn.init.xavier_uniform_(weight, generator=generator))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("_token"):
                _draw(parameter, lambda token: nn.init.normal_(token, std=0.02, generator=generator))


def _draw(parameter: Tensor, law: object) -> None:
    """Fill a parameter on any device with what is drawn on the CPU."""
    parameter.copy_(law(torch.empty(parameter.shape)))  # type: ignore[operator]
