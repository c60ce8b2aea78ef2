"""Crops, and which patches of the global ones are hidden from the student."""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ssl_distill.augment.base import ViewAugment
from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.augment.patch_mask import BlockMasks
from ssl_distill.data.batch import ImageBatch, ObjectBatch
from ssl_distill.draws import Draws
from ssl_distill.views import MaskedCrops, MultiCrop

MASK_STREAM = 2
"""The first stream of random numbers after those of the crops: one for the masks of each global crop."""


class MaskedCropAugment(ViewAugment[MaskedCrops]):
    """Crops of every image with a mask for each global one. The defaults are iBOT's for ViT-S/16.

    Args:
        crops: Makes the crops; None is `ibot_crops`.
        masks: Which patches are hidden, such as `BlockMasks` or `RandomMasks`.
        patch_size: Height and width of the backbone's patches in pixels.

    Source: iBOT (arXiv 2111.07832), section 3 and its official code.
    """

    def __init__(
        self, crops: MultiCropAugment | None = None, masks: nn.Module | None = None, patch_size: int = 16
    ) -> None:
        super().__init__()
        self.crops = crops or ibot_crops()
        self.masks = masks or BlockMasks()
        self.patch_size = patch_size
        self.grid = patch_grid(self.crops.global_size, patch_size)
        self.mean, self.std = self.crops.mean, self.crops.std

    def cut(self, batch: ImageBatch | ObjectBatch, draws: Draws) -> MaskedCrops:
        """Crops in the images' own colours, and masks."""
        masked = [self.masks(batch.index, draws, MASK_STREAM + view, self.grid) for view in range(2)]
        return MaskedCrops(*self.crops.cut(batch, draws), torch.stack(masked))

    def finish(self, views: MaskedCrops, index: Int[Tensor, "B"], draws: Draws) -> MaskedCrops:
        """Colours of each crop by its recipe."""
        crops = self.crops.finish(MultiCrop(views.global_crops, views.local_crops), index, draws)
        return MaskedCrops(*crops, views.masked)


def ibot_crops() -> MultiCropAugment:
    """The crops of iBOT's ViT-S/16."""
    return MultiCropAugment(num_local=10, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25))


def patch_grid(crop_size: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        ValueError: If patches do not tile the crop.
    """
    if patch_size < 1:
        raise ValueError(f"`patch_size` must be at least 1 pixel, got {patch_size}.")
    if crop_size % patch_size:
        below = crop_size // patch_size * patch_size
        raise ValueError(
            f"`global_size` must be a multiple of `patch_size` {patch_size}, got {crop_size}; try"
            f" {below or patch_size} or {below + patch_size}."
        )
    return crop_size // patch_size, crop_size // patch_size
