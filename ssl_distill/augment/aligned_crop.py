"""Crops that overlap, with the places of the same image points in several of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssl_distill.augment.base import ViewAugment
from ssl_distill.augment.color import ColorRecipe, Recipe
from ssl_distill.augment.crops import (
    RandomCrop,
    check_channels,
    check_count,
    check_recipes,
    color_crops,
    color_draws,
    crop_draws,
    pixel_map,
)
from ssl_distill.augment.geometry import CropBoxes
from ssl_distill.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD
from ssl_distill.augment.overlap import crop_box, intersection, move_to_overlap
from ssl_distill.augment.pixel_map import joined
from ssl_distill.augment.stratified import num_samples, project_positions, stratified_patches
from ssl_distill.data.batch import ImageBatch
from ssl_distill.draws import Draws
from ssl_distill.views import AlignedCrops, TokenPositions

UDI_COLORS = ColorRecipe(blur_probability=0.425, solarize_probability=0.1, both_probability=0.01)
"""Colours of all crops."""

_GLOBAL_STREAM, _LOCAL_STREAM, _SAMPLE_STREAM = 0, 1, 2


class Placed(NamedTuple):
    """Where crops of one kind lie.

    Attributes:
        boxes_xyxy: Left, top, right, bottom edges in pixels of the original image.
        flip: True where the crop is mirrored left to right.
        boxes: As `crop_box` gives.
    """

    boxes_xyxy: Float[Tensor, "V B 4"]
    flip: Bool[Tensor, "V B"]
    boxes: Float[Tensor, "V B 4"]

    @property
    def place(self) -> CropBoxes:
        """Where the crops are cut."""
        return CropBoxes(self.boxes_xyxy, self.flip)


class AlignedCropAugment(ViewAugment[AlignedCrops]):
    """Global and local crops that overlap, and sampled points of each in the others. The defaults are UDI's.

    The first global crop lies anywhere, the second is moved to overlap it, local ones to overlap what these share.

    Args:
        global_size: Height and width of global crops in pixels.
        local_size: Height and width of local crops in pixels.
        num_local: Local crops per image; may be 0.
        patch_size: Height and width of the backbone's patches in pixels.
        global_window: Patches along a side of a window of a global crop; one patch is sampled from each.
        local_window: The same of a local crop.
        global_scale: Smallest and largest area of a global crop as a share of the image.
        local_scale: The same of a local crop.
        ratio: Smallest and largest width over height of a crop in the original image.
        flip_probability: Share of crops that are mirrored left to right.
        move: Moves crops: `move_to_overlap`, or `move_to_overlap_as_published`.
        reference: What local crops are moved to, from the boxes of the global ones: `intersection`, or
            `union_as_published`.
        recipe: Colours of all crops: a `ColorRecipe` or a `KorniaRecipe`.
        mean: Of the channels in [0, 1]; subtracted last.
        std: Of the channels; divided by last.

    Source: UDI (arXiv 2407.17671) and its official code.
    """

    def __init__(
        self,
        global_size: int = 224,
        local_size: int = 96,
        num_local: int = 10,
        patch_size: int = 16,
        global_window: int = 3,
        local_window: int = 2,
        global_scale: tuple[float, float] = (0.25, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.25),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_probability: float = 0.5,
        move: Callable[[Tensor, Tensor, Tensor, Tensor], Any] = move_to_overlap,
        reference: Callable[[Tensor, Tensor], Any] = intersection,
        recipe: Recipe = UDI_COLORS,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        check_count({"num_local": num_local})
        check_channels(mean, std)
        check_recipes([recipe], mean, "positions of tokens")
        self.global_grid = _patches_along(global_size, patch_size, "global_size")
        self.local_grid = _patches_along(local_size, patch_size, "local_size")
        for name, window, grid in (
            ("global_window", global_window, self.global_grid),
            ("local_window", local_window, self.local_grid),
        ):
            if not 1 <= window <= grid:
                raise ValueError(f"`{name}` must be from 1 to {grid}, the crop's patches along a side, got {window}.")
        self.global_crop = RandomCrop(
            global_size, global_scale, ratio, flip_probability, names=("global_size", "global_scale")
        )
        self.local_crop = RandomCrop(
            local_size, local_scale, ratio, flip_probability, names=("local_size", "local_scale")
        )
        self.global_size = global_size
        self.local_size = local_size
        self.num_local = num_local
        self.patch_size = patch_size
        self.global_window = global_window
        self.local_window = local_window
        self.move = move
        self.reference = reference
        self.recipe = recipe
        self.mean = mean
        self.std = std

    def cut(self, batch: ImageBatch, draws: Draws) -> AlignedCrops:
        """Crops in the images' own colours, and the points."""
        global_draws = crop_draws(draws, batch.index, _GLOBAL_STREAM, 2)
        local_draws = crop_draws(draws, batch.index, _LOCAL_STREAM, self.num_local)
        global_crops = self._place_global(batch.source_size, global_draws)
        local_crops = self._placed(batch.source_size, local_draws, self.local_crop, self.reference(*global_crops.boxes))
        own, other, local = self._points(batch, draws, global_crops.boxes, local_crops.boxes)
        return AlignedCrops(
            self.global_crop.cut(batch.image, batch.source_size, global_crops.place),
            self.local_crop.cut(batch.image, batch.source_size, local_crops.place),
            own,
            other,
            local,
        )

    def finish(self, views: AlignedCrops, index: Int[Tensor, "B"], draws: Draws) -> AlignedCrops:
        """Colours of all crops by the recipe."""
        global_crops, local_crops = (
            color_crops(
                crops, [self.recipe] * len(crops), color_draws(draws, index, stream, len(crops)), self.mean, self.std
            )
            for stream, crops in ((_GLOBAL_STREAM, views.global_crops), (_LOCAL_STREAM, views.local_crops))
        )
        return views._replace(global_crops=global_crops, local_crops=local_crops)

    def _place_global(self, source_size: Tensor, uniform: Float[Tensor, "2 B draws"]) -> Placed:
        first = self._placed(source_size, uniform[:1], self.global_crop, reference=None)
        second = self._placed(source_size, uniform[1:], self.global_crop, first.boxes[0])
        return Placed(*(torch.cat(both) for both in zip(first, second, strict=True)))

    def _placed(
        self,
        source_size: Float[Tensor, "B 2"],
        uniform: Float[Tensor, "V B draws"],
        crop: RandomCrop,
        reference: Float[Tensor, "B 4"] | None,
    ) -> Placed:
        """Crops, moved to overlap the reference of their image."""
        views = (len(uniform), len(source_size))
        boxes, flip = (each.flatten(0, 1) for each in crop.place(source_size, uniform))
        source_size = source_size.float().repeat(len(uniform), 1)  # a trainer in float64 converts batches
        top_left, size = boxes[:, [1, 0]], boxes[:, [3, 2]] - boxes[:, [1, 0]]
        if reference is not None:
            top_left = self.move(top_left, size, reference.repeat(len(uniform), 1), source_size)
        edges = torch.cat([top_left.flip(1), (top_left + size).flip(1)], dim=1)
        placed = Placed(edges, flip, crop_box(top_left, size, source_size, flip))
        return Placed(*(each.unflatten(0, views) for each in placed))

    def _points(
        self, batch: ImageBatch, draws: Draws, boxes: Float[Tensor, "2 B 4"], local_boxes: Float[Tensor, "L B 4"]
    ) -> tuple[TokenPositions, TokenPositions, TokenPositions]:
        """Sampled points of the global crops at home and in the other, and of local crops in both."""
        counts = [num_samples(self.global_grid, self.global_window), num_samples(self.local_grid, self.local_window)]
        uniform = draws.uniform(batch.index, _SAMPLE_STREAM, sum(counts) + 2)
        global_draws, local_draws, corners = uniform.split([*counts, 2], dim=1)
        grid, local_grid = self.global_grid, self.local_grid
        patches = stratified_patches(
            (global_draws * self.global_window**2).long(), corners[:, 0], grid, self.global_window
        )
        local_patches = stratified_patches(
            (local_draws * self.local_window**2).long(), corners[:, 1], local_grid, self.local_window
        )
        swapped = boxes.flip(0)
        moved, local_moved = (
            pixel_map(
                [self.recipe] * views, (len(self.mean), size, size), color_draws(draws, batch.index, stream, views)
            )
            for stream, size, views in (
                (_GLOBAL_STREAM, self.global_size, 2),
                (_LOCAL_STREAM, self.local_size, self.num_local),
            )
        )
        sides = moved.views(2)[::-1] if moved else []  # where crop 1 went, and crop 0
        own, other = project_positions(
            patches.repeat(2, 1),
            boxes.flatten(0, 1),
            swapped.flatten(0, 1),
            grid,
            grid,
            moved,
            joined(sides) if moved else None,
        )
        pairs = (self.num_local, *swapped.shape[:2])  # (L, 2, B): every local crop with crop 1, then with crop 0
        if not (moved and local_moved):
            _, local = project_positions(
                local_patches.repeat(2 * self.num_local, 1),
                local_boxes[:, None].expand(*pairs, 4).flatten(0, 2),
                swapped[None].expand(*pairs, 4).flatten(0, 2),
                local_grid,
                grid,
            )
        else:
            columns = zip(
                *(
                    project_positions(local_patches, box, target, local_grid, grid, leave, enter)[1]
                    for box, leave in zip(local_boxes, local_moved.views(self.num_local), strict=True)
                    for target, enter in zip(swapped, sides, strict=True)
                ),
                strict=True,
            )
            local = TokenPositions(*(torch.cat(column) for column in columns))
        return (
            TokenPositions(*(each.unflatten(0, swapped.shape[:2]) for each in own)),
            TokenPositions(*(each.unflatten(0, swapped.shape[:2]) for each in other)),
            TokenPositions(*(each.unflatten(0, pairs) for each in local)),
        )


def _patches_along(size: int, patch_size: int, argument: str) -> int:
    """Patches along a side of a crop.

    Raises:
        ValueError: If patches do not tile it.
    """
    if patch_size < 1:
        raise ValueError(f"`patch_size` must be at least 1 pixel, got {patch_size}.")
    if size < patch_size or size % patch_size:
        below = size // patch_size * patch_size
        raise ValueError(
            f"`{argument}` must be a multiple of `patch_size` {patch_size}, got {size}; try"
            f" {below or patch_size} or {(below or patch_size) + patch_size}."
        )
    return size // patch_size
