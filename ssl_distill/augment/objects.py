"""What an object is to a crop and to an attention mask: its box or its pixels."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ssl_distill.augment.object_region import BoxRegions, MaskRegions, box_hull, grow, patches_of
from ssl_distill.data.batch import ObjectBatch


class BoxObjects(nn.Module):
    """Objects are their boxes.

    Args:
        threshold: A patch belongs to the object if this share of it is exceeded; below 0 all patches do, so that only
            the crops know of the object.
        margin: Patches by which the object is grown.

    Source: ODIS; the margin is that of public code that follows it.
    """

    def __init__(self, threshold: float = 0.0, margin: int = 1) -> None:
        super().__init__()
        _check(threshold, margin)
        self.threshold = threshold
        self.margin = margin

    def area(self, batch: ObjectBatch) -> Float[Tensor, "B M"]:
        """Share of the image that each object covers."""
        return (batch.boxes_xyxy[..., 2:] - batch.boxes_xyxy[..., :2]).clamp(min=0).prod(-1).float()

    def regions(self, batch: ObjectBatch, chosen: Int[Tensor, "B"]) -> BoxRegions:
        """One object of every image, in pixels of its masks; the whole image where `chosen` is -1."""
        height, width = batch.masks.shape[-2:]
        boxes = batch.boxes_xyxy[torch.arange(len(chosen), device=chosen.device), chosen.clamp(min=0)].float()
        boxes = torch.where(chosen[:, None] < 0, boxes.new_tensor([0.0, 0.0, 1.0, 1.0]), boxes)
        return BoxRegions(boxes * boxes.new_tensor([width, height, width, height]))

    def patches(self, fraction: Float[Tensor, "B h w"]) -> Bool[Tensor, "B h w"]:
        """Patches that belong to the object, from the share of each that it covers."""
        return grow(patches_of(fraction, self.threshold), self.margin)


class MaskObjects(nn.Module):
    """Objects are their pixels.

    Args:
        threshold: As in `BoxObjects`.

    Source: ODIS, first version.
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        _check(threshold, 0)
        self.threshold = threshold

    def area(self, batch: ObjectBatch) -> Float[Tensor, "B M"]:
        """Share of the image that each object covers."""
        return batch.masks.flatten(2).float().mean(2)

    def regions(self, batch: ObjectBatch, chosen: Int[Tensor, "B"]) -> MaskRegions:
        """One object of every image; the whole image where `chosen` is -1."""
        masks = batch.masks[torch.arange(len(chosen), device=chosen.device), chosen.clamp(min=0)]
        return MaskRegions.of(masks | (chosen < 0)[:, None, None])

    def patches(self, fraction: Float[Tensor, "B h w"]) -> Bool[Tensor, "B h w"]:
        """Patches that belong to the object, from the share of each that it covers."""
        return patches_of(fraction, self.threshold)


class HullObjects(MaskObjects):
    """Objects are their pixels for crops, and for attention the boxes of their connected parts, grown by a margin.

    Args:
        threshold: As in `BoxObjects`.
        margin: As in `BoxObjects`.

    Source: public code that follows ODIS.
    """

    def __init__(self, threshold: float = 0.0, margin: int = 1) -> None:
        super().__init__(threshold)
        _check(threshold, margin)
        self.margin = margin

    def patches(self, fraction: Float[Tensor, "B h w"]) -> Bool[Tensor, "B h w"]:
        """Patches that belong to the object, from the share of each that it covers."""
        return grow(box_hull(super().patches(fraction)), self.margin)


def _check(threshold: float, margin: int) -> None:
    if not threshold < 1:
        raise ValueError(f"`threshold` must be below 1, the whole patch, got {threshold}.")
    if margin < 0:
        raise ValueError(f"`margin` must be at least 0 patches, got {margin}.")
