"""Frozen ViTs whose tokens are to be predicted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.official import load_official_vit
from ssl_distill.backbones.vit import Tokens, VisionTransformer
from ssl_distill.reading.tensors import load_tensors


class StagedFeatures(nn.Module):
    """A teacher that is the student's encoder of an earlier stage, at first only its lowest blocks.

    Args:
        backbone: A network as the student's encoder; frozen here.
        depth: How many of its blocks the first teacher has; 0 leaves patch embedding and positions.

    Raises:
        ValueError: If there are not so many blocks.

    Source: dBOT (arXiv 2209.03917), section 3.2.
    """

    def __init__(self, backbone: VisionTransformer, depth: int) -> None:
        super().__init__()
        most = len(backbone.blocks)
        if not 0 <= depth <= most:
            raise ValueError(
                f"`initial_teacher_depth` must be from 0 to {most}, the depth of the student that it is a copy of, got"
                f" {depth}; for a deeper teacher give a FrozenFeatures as `teacher`."
            )
        self.backbone = backbone.requires_grad_(False)
        self.embed_dim = backbone.embed_dim
        self.depth = depth
        self.stage = 0

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Tokens:
        """Class and patch tokens after the last block, before the final norm."""
        x = self.backbone.embed(images)
        for block in self.backbone.blocks[: self.depth]:
            x = block(x)
        return Tokens(x[:, :1], x[:, self.backbone.num_prefix_tokens :])

    def follow(self, student: VisionTransformer, depth: int) -> None:
        """Become the student's encoder, of which `depth` blocks are in use."""
        self.backbone.load_state_dict(student.state_dict())
        self.depth = depth
        self.stage += 1

    def get_extra_state(self) -> Tensor:
        """Depth and stage: what a checkpoint must tell besides the weights."""
        return torch.tensor([self.depth, self.stage])

    def set_extra_state(self, state: Tensor) -> None:
        """Depth and stage out of a checkpoint."""
        self.depth, self.stage = state.tolist()


class FrozenFeatures(nn.Module):
    """Any trained ViT as a teacher, of any depth and width, with patches of any size.

    Args:
        backbone: A plain ViT of timm by name, or such a module with its weights.
        backbone_kwargs: Further arguments of the timm model, such as `img_size` or `pretrained`.
        checkpoint: File with its weights: a backbone.safetensors of ours, or an official DINO, iBOT, MAE or dBOT one.
        student_patch_size: Height and width of the student's patches in pixels. Images are resized for a teacher with
            other patches, so that both have the same grid.
        mean: Of the channels, as the teacher was trained with.
        std: Of the channels, as the teacher was trained with.
        student_mean: Of the channels, as the images were normalised.
        student_std: Of the channels, as the images were normalised.

    Raises:
        ValueError: If the network is no plain ViT with a class token, or nothing says where its weights come from.

    Source: dBOT (arXiv 2209.03917), section 4, larger teachers.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: str | nn.Module,
        backbone_kwargs: dict[str, Any] | None = None,
        checkpoint: str | None = None,
        student_patch_size: int = 16,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        student_mean: Sequence[float] = (0.485, 0.456, 0.406),
        student_std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        kwargs = backbone_kwargs or {}
        if isinstance(backbone, str) and checkpoint is None and not kwargs.get("pretrained"):
            raise ValueError(
                f"`checkpoint` must name the weights of teacher {backbone}, or `backbone_kwargs` have pretrained: true;"
                " without either it would be a random network."
            )
        network = create_backbone(backbone, **kwargs)
        if not isinstance(network, VisionTransformer) or network.num_class_tokens < 1:
            raise ValueError(
                f"`backbone` must be a plain ViT of timm with a class token, got {type(network).__name__}."
            )
        if checkpoint is not None:
            _load(network, checkpoint)
        self.backbone = network.requires_grad_(False)
        self.embed_dim = network.embed_dim
        self.student_patch_size = student_patch_size
        self.student_normalization = (tuple(student_mean), tuple(student_std))
        old_mean, old_std, new_mean, new_std = (
            torch.tensor(values).view(3, 1, 1) for values in (student_mean, student_std, mean, std)
        )
        self.register_buffer("scale", old_std / new_std, persistent=False)
        self.register_buffer("shift", (old_mean - new_mean) / new_std, persistent=False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Tokens:
        """Class and patch tokens after the last block, before the final norm."""
        height, width = (side // self.student_patch_size for side in images.shape[2:])
        rows, columns = self.backbone.patch_embed.patch_size
        images = images * self.scale + self.shift
        if images.shape[2:] != (height * rows, width * columns):
            images = F.interpolate(images, size=(height * rows, width * columns), mode="bicubic", antialias=True)
        return self.backbone.block_tokens(images)[0]


def _load(network: VisionTransformer, checkpoint: str) -> None:
    if not Path(checkpoint).is_file():
        raise ValueError(f"`checkpoint` {checkpoint} does not exist.")
    load_official_vit(network, load_tensors(checkpoint))
