"""WaffleIron: a point network of dense 2-D convolutions and pointwise layers (arXiv 2301.10100)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_distill.lidar.batch import PointBatch
from ssl_distill.lidar.grids import GridIndex, flatten, grid_indices, inflate


class WaffleIron(nn.Module):
    """Keeps one token per point; every layer mixes tokens on a grid, then channels in each token.

    The grids' projections take turns through the depth. Deviation: clouds are ragged, not padded, so batch-norm
    statistics are those of the points alone. With layer norm the results are equal.

    Args:
        grids: Rows and columns of each projection's grid, in the order of `PointBatch.cells`.
        channels: C, the width of the tokens.
        depth: Number of layers.
        in_features: F, the width of the points' features.
        norm: Made from C, in front of every mixer: `torch.nn.LayerNorm` (ScaLR) or `torch.nn.BatchNorm1d`.
        activation: Inside every mixer: `torch.nn.ReLU`, or `torch.nn.GELU` (ScaLR+).
        drop_path_rate: Chance of a cloud to skip a mixer, the same for all.
        layer_scale: What the learned scale of every mixer starts at; None draws it from U(-1, 1), as published.
        checkpointing: Recompute mixers in the backward pass instead of keeping what is inside them.

    Source: WaffleIron (arXiv 2301.10100), section 3; ScaLR's settings are the defaults.
    """

    def __init__(
        self,
        grids: Sequence[Sequence[int]] = ((256, 256), (256, 32), (256, 32)),
        channels: int = 768,
        depth: int = 48,
        in_features: int = 5,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        activation: Callable[[], nn.Module] = nn.ReLU,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"channels": channels, "depth": depth, "in_features": in_features}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.grids = tuple((rows, columns) for rows, columns in grids)
        if not self.grids or min(min(grid) for grid in self.grids) < 1:
            raise ValueError(f"`grids` must be one or more pairs of positive numbers, got {grids}.")
        if checkpointing and isinstance(norm(1), nn.modules.batchnorm._BatchNorm):
            raise ValueError("`checkpointing` needs a norm without statistics: they would be updated twice.")
        self.num_features = channels
        self.checkpointing = checkpointing
        self.embedding = Embedding(in_features, channels)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "spatial": SpatialMixing(channels, norm, activation, layer_scale),
                    "channel": ChannelMixing(channels, norm, activation, layer_scale),
                }
            )
            for _ in range(depth)
        )
        self.drop_path = DropPath(drop_path_rate)
        # What `export_backbone` writes down, and `load_waffleiron` makes the network again from.
        self.timm_name = None
        self.loader = "ssl_distill.lidar.official.load_waffleiron"
        self.timm_kwargs: dict[str, Any] = {
            "grids": self.grids,
            "channels": channels,
            "depth": depth,
            "in_features": in_features,
            "norm": _import_path(norm(1)),
            "activation": _import_path(activation()),
        }

    def forward(self, points: PointBatch) -> Float[Tensor, "P C"]:
        """A token for every point."""
        indices = grid_indices(points, self.grids)
        cloud = points.cloud
        tokens = self.embedding(points.features, points.neighbors)
        for d, layer in enumerate(self.layers):
            grid = indices[d % len(indices)]
            for mix in (layer.get_submodule("spatial"), layer.get_submodule("channel")):
                if self.checkpointing and torch.is_grad_enabled():
                    change = checkpoint(mix, tokens, grid, use_reentrant=False)
                else:
                    change = mix(tokens, grid)
                tokens = tokens + self.drop_path(change, cloud, grid.shape[0])
        return tokens


def _import_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


class Embedding(nn.Module):
    """A point's features, and the largest response to what its neighbours differ in, as one token.

    Args:
        in_features: F.
        channels: C.

    Source: WaffleIron (arXiv 2301.10100), section 3.3.
    """

    def __init__(self, in_features: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(in_features)
        self.point = nn.Linear(in_features, channels)
        self.neighbor = nn.Sequential(
            nn.BatchNorm1d(in_features),
            nn.Linear(in_features, channels, bias=False),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
            nn.Linear(channels, channels, bias=False),
        )
        self.merge = nn.Linear(2 * channels, channels)

    def forward(self, features: Float[Tensor, "P F"], neighbors: Int[Tensor, "P K"]) -> Float[Tensor, "P C"]:
        """Tokens; the first neighbour is the point itself and is left out."""
        features = self.norm(features)
        others = neighbors[:, 1:]
        differences = features[others] - features[:, None]  # (P, K - 1, F)
        responses = self.neighbor(differences.flatten(0, 1)).unflatten(0, others.shape)
        return self.merge(torch.cat([self.point(features), responses.amax(1)], dim=1))


class SpatialMixing(nn.Module):
    """Tokens averaged on a grid, convolved twice within their channel, scaled and read back at the points."""

    def __init__(
        self,
        channels: int,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        activation: Callable[[], nn.Module] = nn.ReLU,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.convs = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            activation(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        )
        self.scale = nn.Parameter(initial_scale(channels, layer_scale).view(-1, 1, 1))

    def forward(self, tokens: Float[Tensor, "P C"], grid: GridIndex) -> Float[Tensor, "P C"]:
        """The residual."""
        return inflate(self.convs(flatten(self.norm(tokens), grid)) * self.scale, grid)


class ChannelMixing(nn.Module):
    """A two-layer perceptron on every token of its own, scaled."""

    def __init__(
        self,
        channels: int,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        activation: Callable[[], nn.Module] = nn.ReLU,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, channels), activation(), nn.Linear(channels, channels))
        # Two dimensions, so that the rule "vectors are not decayed" passes it by, as in the published code.
        self.scale = nn.Parameter(initial_scale(channels, layer_scale).view(1, -1))

    def forward(self, tokens: Float[Tensor, "P C"], grid: GridIndex) -> Float[Tensor, "P C"]:
        """The residual; the grid is of no use."""
        residual: Tensor = self.mlp(self.norm(tokens)) * self.scale
        return residual


def initial_scale(channels: int, value: float | None) -> Float[Tensor, "C"]:
    """U(-1, 1), as the published code has it from its way to store the scale, or a constant."""
    return torch.rand(channels) * 2 - 1 if value is None else torch.full((channels,), value)


class DropPath(nn.Module):
    """Stochastic depth cloud by cloud, in training.

    Args:
        drop_prob: Chance of a cloud's residual to be dropped; the others are scaled up.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"`drop_path_rate` must lie in [0, 1), got {drop_prob}.")
        self.drop_prob = drop_prob

    def forward(self, residual: Float[Tensor, "P C"], cloud: Int[Tensor, "P"], num_clouds: int) -> Tensor:
        """The residual, 0 for all points of some clouds."""
        if not self.training or self.drop_prob == 0:
            return residual
        return drop_path(residual, cloud, torch.rand(num_clouds, device=residual.device), self.drop_prob)


def drop_path(
    residual: Float[Tensor, "P C"], cloud: Int[Tensor, "P"], uniform: Float[Tensor, "B"], drop_prob: float
) -> Float[Tensor, "P C"]:
    """Keep the clouds whose number in [0, 1) is at least `drop_prob`, scaled so that the mean is unchanged."""
    keep = 1 - drop_prob
    factor = (keep + uniform).floor() / keep
    return residual * factor.to(residual.dtype)[cloud, None]
