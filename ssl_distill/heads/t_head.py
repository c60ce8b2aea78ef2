"""A small transformer on a backbone's map, which can be asked about what another network saw."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_distill.backbones.position import PositionMode, resize_position_embedding
from ssl_distill.heads.prototype import FreePrototypes


class THead(nn.Module):
    """T-Head: a map's places as tokens, transformer blocks, the mean token against prototypes.

    Args:
        in_dim: Channels of the map.
        num_prototypes: K.
        grid: Rows and columns of the map of a global crop; positions are resized for other maps.
        is_tokens: Whether the map is a transformer's tokens, which are projected to D only if their width is another;
            a ConvNet's map always is.
        embed_dim: D, the width of the blocks and of queries.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        mlp_ratio: Width of a block's MLP over D.
        position_mode: How positions are resized; "dino_v1" for weights of the official code.

    Source: MOKD's official code.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        grid: tuple[int, int],
        is_tokens: bool = True,
        embed_dim: int = 384,
        depth: int = 3,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        position_mode: PositionMode = "size_antialias",
    ) -> None:
        super().__init__()
        for name, value in {"num_prototypes": num_prototypes, "embed_dim": embed_dim, "depth": depth}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"`num_heads` must divide `embed_dim` {embed_dim}, got {num_heads}.")
        self.embed_dim = embed_dim
        self.grid = grid
        self.position_mode = position_mode
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], embed_dim))
        norm: Any = partial(nn.LayerNorm, eps=1e-6)  # timm asks for a class, and calls it
        blocks = [Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm(embed_dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        # The projection keeps torch's default initialisation, as the official 1x1 convolution does.
        self.projection = nn.Identity() if is_tokens and in_dim == embed_dim else nn.Linear(in_dim, embed_dim)
        self.last_layer = FreePrototypes(embed_dim, num_prototypes)

    def forward(self, feature_map: Float[Tensor, "B C h w"]) -> Float[Tensor, "B K"]:
        """Logits of a map."""
        return self._logits(self._tokens(feature_map), 0)

    def search(self, feature_map: Float[Tensor, "B C h w"], queries: Float[Tensor, "L B D"]) -> Float[Tensor, "L B K"]:
        """Logits of a map, adapted to each query: an extra token that all places may attend to.

        The result is read from the map's tokens, not from the query's.

        Args:
            feature_map: Of one global crop.
            queries: What another network saw in each local crop, as its head's `query` gives it.

        Source: MOKD, cross-attention feature search.
        """
        places = self._tokens(feature_map).expand(len(queries), -1, -1, -1)  # (L, B, N, D)
        asked = torch.cat([queries[:, :, None], places], dim=2)  # (L, B, 1 + N, D); the query has no position
        return self._logits(asked.flatten(0, 1), 1).unflatten(0, queries.shape[:2])

    def query(self, summary: Float[Tensor, "*V C"]) -> Float[Tensor, "*V D"]:
        """What this head's backbone saw, for another head's `search`; no gradient flows back."""
        projected: Tensor = self.projection(summary)
        return projected.detach()

    def _tokens(self, feature_map: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N D"]:
        projected = self.projection(feature_map.flatten(2).transpose(1, 2))
        grid = (feature_map.shape[2], feature_map.shape[3])
        positions: Tensor = resize_position_embedding(self.pos_embed, self.grid, grid, 0, self.position_mode)
        return projected + positions

    def _logits(self, tokens: Float[Tensor, "B S D"], num_prefix_tokens: int) -> Float[Tensor, "B K"]:
        attended = self.norm(self.blocks(tokens))
        return self.last_layer(attended[:, num_prefix_tokens:].mean(1))
