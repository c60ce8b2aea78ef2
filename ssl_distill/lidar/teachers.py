"""Frozen image networks that give a feature for every patch of a picture."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.position import PositionMode

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageTeacher(nn.Module):
    """From pictures in [0, 1] to a grid of features.

    Attributes:
        num_features: D.
        patch_size: Pixels per side that one feature stands for.
        num_pictures_to_fit: Pictures that `fit` wants before training; 0 for a teacher that is complete.
    """

    num_features: int
    patch_size: int
    num_pictures_to_fit = 0

    def fit(self, images: Sequence[Float[Tensor, "_ 3 _ _"]]) -> None:
        """Adapt to pictures of the data, if need be."""

    def check_image_size(self, image_size: tuple[int, int]) -> None:
        """Refuse a size that patches do not tile.

        Raises:
            ValueError: If it is no multiple of the patch size; names one that is.
        """
        if any(side % self.patch_size for side in image_size):
            near = tuple(max(side // self.patch_size, 1) * self.patch_size for side in image_size)
            raise ValueError(
                f"`image_size` must be a multiple of the teacher's patch size {self.patch_size}, got {image_size};"
                f" try {near}."
            )


class ViTTeacher(ImageTeacher):
    """Patch tokens of a vision transformer's last block, before the final norm.

    Any timm transformer by name. Prefix tokens (class and registers) are left out.

    Args:
        name: timm name; the default is DINOv2's ViT-L/14.
        pretrained: Whether to load timm's weights; random ones teach little.
        position_mode: How position embeddings are resized; "dino_v1" for parity with published ScaLR checkpoints.
        kwargs: Further arguments of the timm model.

    Source: ScaLR (arXiv 2310.17504), by its published code.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str = "vit_large_patch14_dinov2.lvd142m",
        pretrained: bool = True,
        position_mode: PositionMode = "size_antialias",
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        backbone: Any = create_backbone(name, position_mode, pretrained=pretrained, **(kwargs or {}))
        if not hasattr(backbone, "forward_intermediates") or not hasattr(backbone, "patch_embed"):
            raise ValueError(f"`name` must be a transformer with patches, {name} is a {type(backbone).__name__}.")
        self.backbone = backbone
        self.num_features = backbone.num_features
        self.patch_size = max(backbone.patch_embed.patch_size)
        config = getattr(backbone, "pretrained_cfg", {})
        for key, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            values = config.get(key, default) if pretrained else default
            self.register_buffer(key, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """Features, rows first."""
        (tokens,) = self.backbone.forward_intermediates(
            (images - self.mean) / self.std, 1, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        return tokens


class PatchStats(ImageTeacher):
    """A teacher without weights: colours and contrasts of every patch, and how it differs from those around it.

    16 channels: mean RGB; R - G and G - B of it; deviation of RGB; mean absolute differences along columns and rows;
    mean RGB over 3 x 3 patches; and the patch's minus that. Each is standardised with statistics of some pictures,
    which `fit` takes; until then they are as they are.

    Args:
        patch_size: Pixels per side.
    """

    center: Tensor
    scale: Tensor
    mean: Tensor
    std: Tensor
    num_features = 16
    num_pictures_to_fit = 30

    def __init__(self, patch_size: int = 4) -> None:
        super().__init__()
        if patch_size < 2:
            raise ValueError(f"`patch_size` must be at least 2, got {patch_size}.")
        self.patch_size = patch_size
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.register_buffer("center", torch.zeros(16, 1, 1))
        self.register_buffer("scale", torch.ones(16, 1, 1))

    @torch.no_grad()
    def fit(self, images: Sequence[Float[Tensor, "_ 3 _ _"]]) -> None:
        """Standardise every channel over the patches of these pictures."""
        values = torch.cat([self._raw(batch.to(self.mean)).transpose(0, 1).flatten(1) for batch in images], 1)
        self.center.copy_(values.mean(1)[:, None, None])
        self.scale.copy_(values.std(1).clamp(min=1e-6)[:, None, None])

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """Features, rows first."""
        return (self._raw(images) - self.center) / self.scale

    def _raw(self, images: Tensor) -> Tensor:
        images = (images - self.mean) / self.std
        mean = self._pool(images)
        deviation = (self._pool(images.square()) - mean.square()).clamp(min=0).sqrt()
        along_x = F.pad((images[..., :, 1:] - images[..., :, :-1]).abs().mean(1, keepdim=True), (0, 1))
        along_y = F.pad((images[..., 1:, :] - images[..., :-1, :]).abs().mean(1, keepdim=True), (0, 0, 0, 1))
        around = F.avg_pool2d(F.pad(mean, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        contrast = mean[:, :2] - mean[:, 1:]  # R - G, G - B
        edges = [self._pool(along_x), self._pool(along_y)]
        return torch.cat([mean, contrast, deviation, *edges, around, mean - around], 1)

    def _pool(self, values: Tensor) -> Tensor:
        return F.avg_pool2d(values, self.patch_size)


class TokenCache:
    """What a frozen teacher said of pictures that do not change, kept in main memory.

    Args:
        capacity_gib: When it is full, no more is added; 0 keeps nothing.
    """

    def __init__(self, capacity_gib: float) -> None:
        if capacity_gib < 0:
            raise ValueError(f"the cache's capacity must be at least 0 GiB (0: no cache), got {capacity_gib}.")
        self._room = capacity_gib * 2**30
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @torch.no_grad()
    def __call__(
        self, teacher: nn.Module, images: Float[Tensor, "B 3 H W"], pictures: list[int]
    ) -> Float[Tensor, "B D h w"]:
        """Features of every picture, computed for those that are new.

        Args:
            teacher: Always the same.
            images: The pictures.
            pictures: Their numbers, the same number for the same picture only.
        """
        new = [i for i, picture in enumerate(pictures) if picture not in self._kept]
        computed = dict(zip(new, teacher(images[new]), strict=True)) if new else {}
        for i, tokens in computed.items():
            size = tokens.numel() * tokens.element_size()
            if pictures[i] not in self._kept and size <= self._room:
                self._room -= size
                self._kept[pictures[i]] = tokens.cpu()
        found = [computed[i] if i in computed else self._kept[picture] for i, picture in enumerate(pictures)]
        return torch.stack([tokens.to(images.device, non_blocking=True) for tokens in found])
