"""Class and patch tokens to logits over prototypes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ssl_distill.heads.prototype import FreePrototypes, PrototypeHead


class TokenLogits(NamedTuple):
    """Logits of class tokens and of those patch tokens that were asked for."""

    class_logits: Float[Tensor, "*c K"]
    patch_logits: Float[Tensor, "*p K2"]


class TokenHead(PrototypeHead):
    """One head for class and patch tokens: what the class token learns becomes the vocabulary of the patches.

    Args:
        in_dim: Width of the tokens.
        num_prototypes: K, the number of logits.
        hidden_dim: Width of the MLP.
        bottleneck_dim: Width of the unit vector that the prototypes see.
        num_layers: Linear layers of the MLP.
        norm: Made for every hidden layer from its width; None for none.
        prototypes: Made from (bottleneck_dim, num_prototypes).

    Source: iBOT (arXiv 2111.07832), section 3.2.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        norm: Callable[[int], nn.Module] | None = None,
        prototypes: Callable[[int, int], nn.Module] = FreePrototypes,
    ) -> None:
        super().__init__(in_dim, num_prototypes, hidden_dim, bottleneck_dim, num_layers, norm, prototypes)
        self.num_patch_prototypes = num_prototypes

    @property
    def patch_prototypes(self) -> nn.Module:
        """The prototypes of patch tokens."""
        return self.last_layer

    @property
    def last_layers(self) -> nn.ModuleList:
        """All prototypes, for what holds them still."""
        return nn.ModuleList([self.last_layer, self.patch_prototypes])

    def forward(  # type: ignore[override]  # there are two kinds of token
        self, class_tokens: Float[Tensor, "*c D"], patch_tokens: Float[Tensor, "*p D"]
    ) -> TokenLogits:
        """Logits of both kinds of token."""
        class_rows, patch_rows = self.bottlenecks(class_tokens.flatten(0, -2), patch_tokens.flatten(0, -2))
        return TokenLogits(
            self.last_layer(class_rows).unflatten(0, class_tokens.shape[:-1]),
            self.patch_prototypes(patch_rows).unflatten(0, patch_tokens.shape[:-1]),
        )

    def bottlenecks(
        self, class_rows: Float[Tensor, "c D"], patch_rows: Float[Tensor, "p D"]
    ) -> tuple[Float[Tensor, "c bottleneck"], Float[Tensor, "p bottleneck"]]:
        """Unit vectors of both kinds of token, each by itself: a batch norm of all would be one of patches."""
        if len(patch_rows) > 1:
            return self.bottleneck(class_rows), self.bottleneck(patch_rows)
        both = self.bottleneck(torch.cat([class_rows, patch_rows]))  # a batch norm cannot take a single row
        return both[: len(class_rows)], both[len(class_rows) :]

    def masked_and_mean(
        self, class_tokens: Float[Tensor, "B D"], patch_tokens: Float[Tensor, "B N D"], masked: Bool[Tensor, "B N"]
    ) -> tuple[TokenLogits, Float[Tensor, "B K2"]]:
        """Logits of class tokens and masked patches, and each image's mean of the logits of all its patches.

        Prototypes are linear, so the mean of logits is the logit of the mean bottleneck: only the logits of masked
        patches and one row per image are ever made.
        """
        class_rows, patch_rows = self.bottlenecks(class_tokens, patch_tokens.flatten(0, 1))
        patch_rows = patch_rows.unflatten(0, masked.shape)
        logits = TokenLogits(self.last_layer(class_rows), self.patch_prototypes(patch_rows[masked]))
        return logits, self.patch_prototypes(patch_rows.mean(1))


class SeparateTokenHead(TokenHead):
    """The MLP is shared by class and patch tokens, the prototypes are not.

    Args:
        in_dim: Width of the tokens.
        num_prototypes: K, the number of logits of class tokens.
        num_patch_prototypes: The number of logits of patch tokens.
        hidden_dim: Width of the MLP.
        bottleneck_dim: Width of the unit vector that the prototypes see.
        num_layers: Linear layers of the MLP.
        norm: Made for every hidden layer from its width; None for none.
        prototypes: Made from (bottleneck_dim, num_prototypes), then from (bottleneck_dim, num_patch_prototypes).

    Source: iBOT's official code.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        num_patch_prototypes: int = 8192,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        norm: Callable[[int], nn.Module] | None = None,
        prototypes: Callable[[int, int], nn.Module] = FreePrototypes,
    ) -> None:
        super().__init__(in_dim, num_prototypes, hidden_dim, bottleneck_dim, num_layers, norm, prototypes)
        if num_patch_prototypes < 1:
            raise ValueError(f"`num_patch_prototypes` must be at least 1, got {num_patch_prototypes}.")
        self.num_patch_prototypes = num_patch_prototypes
        self.last_layer2 = prototypes(bottleneck_dim, num_patch_prototypes)  # the official name

    @property
    def patch_prototypes(self) -> nn.Module:
        """The prototypes of patch tokens."""
        return self.last_layer2
