"""Crops that show one object of every image, and where in them it is."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ssl_distill.augment.base import ViewAugment
from ssl_distill.augment.checks import check_probability
from ssl_distill.augment.color import DRAWS_PER_COLOR
from ssl_distill.augment.crops import RandomCrop, check_recipes, color_crops, pixel_map, whole_image
from ssl_distill.augment.geometry import DRAWS_PER_CROP, CropBoxes, scale_boxes
from ssl_distill.augment.masked_crop import MASK_STREAM, ibot_crops, patch_grid
from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.augment.object_choice import ChoiceLaw, by_area, choose, choose_crop
from ssl_distill.augment.object_region import BoxRegions, MaskRegions
from ssl_distill.augment.objects import MaskObjects
from ssl_distill.augment.patch_mask import BlockMasks
from ssl_distill.data.batch import ObjectBatch
from ssl_distill.draws import Draws
from ssl_distill.views import ObjectCrops

Missing = Literal["whole_image", "skip"]
_GLOBAL_STREAM, _LOCAL_STREAM = 0, 1
_OBJECT_STREAM, _GLOBAL_COLOR_STREAM, _LOCAL_COLOR_STREAM = MASK_STREAM + 2, MASK_STREAM + 3, MASK_STREAM + 4


class _Crops(NamedTuple):
    """Crops of one kind: V of each of B images, out of C that were drawn for it."""

    boxes_xyxy: Float[Tensor, "B V C 4"]
    flip: Bool[Tensor, "B V C"]


class _Chosen(NamedTuple):
    """The crops that were taken."""

    boxes_xyxy: Float[Tensor, "V B 4"]
    flip: Bool[Tensor, "V B"]
    coverage: Float[Tensor, "V B"]
    redraws: Int[Tensor, "V B"]
    fallback: Bool[Tensor, "V B"]

    @property
    def place(self) -> CropBoxes:
        """Where the crops are cut."""
        return CropBoxes(self.boxes_xyxy, self.flip)


class ObjectCropAugment(ViewAugment[ObjectCrops]):
    """Crops drawn until they show the image's chosen object, with masks of what is hidden and what may be attended to.

    One object is chosen per image, for all of its views. Crops are refused by their coordinates alone; pixels are
    resampled once.

    Args:
        crops: Sizes, scales and colours of the crops; None is `ibot_crops`.
        masks: Which patches are hidden, as for iBOT.
        patch_size: Height and width of the backbone's patches in pixels.
        objects: What an object is: `MaskObjects`, `HullObjects` or `BoxObjects`.
        choice: Which object is chosen: `by_area`, `uniformly`, `largest` or `smallest`.
        min_area: Objects below this share of the image are never chosen.
        tries: Draws of a global crop; after them the best of all, the whole image among them, is taken.
        min_visible: A global crop must show this share of the object.
        min_coverage: The object must cover this share of a global crop. Min_visible 1 and min_coverage 0 is the
            paper's rule taken literally; both 0 ask for nothing.
        local_tries: Draws of a local crop; after them the one that the object covers most is taken.
        local_min_coverage: The object must cover this share of a local crop.
        missing: Without an object to choose, "whole_image" trains as iBOT does, with the image as the object, and
            "skip" leaves the image out of the object loss.

    Source: ODIS, object-aware cropping; what the paper leaves open is ours, see docs/methods/odis.md.
    """

    def __init__(
        self,
        crops: MultiCropAugment | None = None,
        masks: nn.Module | None = None,
        patch_size: int = 16,
        objects: nn.Module | None = None,
        choice: ChoiceLaw = by_area,
        min_area: float = 0.02,
        tries: int = 20,
        min_visible: float = 0.25,
        min_coverage: float = 0.04,
        local_tries: int = 10,
        local_min_coverage: float = 0.04,
        missing: Missing = "whole_image",
    ) -> None:
        super().__init__()
        for name, count in {"tries": tries, "local_tries": local_tries}.items():
            if count < 1:
                raise ValueError(f"`{name}` must be at least 1, got {count}.")
        shares = {"min_area": min_area, "min_visible": min_visible, "min_coverage": min_coverage}
        for name, value in {**shares, "local_min_coverage": local_min_coverage}.items():
            check_probability(name, value)
        if missing not in get_args(Missing):
            raise ValueError(f"`missing` must be one of {', '.join(get_args(Missing))}, got {missing}.")
        self.crops = crops or ibot_crops()
        self.masks: Any = masks or BlockMasks()
        self.patch_size = patch_size
        self.grid = patch_grid(self.crops.global_size, patch_size)
        self.objects: Any = objects or MaskObjects()
        self.choice = choice
        self.min_area = min_area
        self.tries = tries
        self.min_visible = min_visible
        self.min_coverage = min_coverage
        self.local_tries = local_tries
        self.local_min_coverage = local_min_coverage
        self.missing = missing
        self.mean, self.std = self.crops.mean, self.crops.std
        check_recipes(self.crops.global_recipes, self.mean, "masks of objects")

    def cut(self, batch: ObjectBatch, draws: Draws) -> ObjectCrops:
        """Crops in the images' own colours, and masks."""
        crops, mask_size = self.crops, batch.masks.shape[-2:]
        chosen = self._choose_object(batch, draws)
        regions, whole = self.objects.regions(batch, chosen), chosen < 0
        drawn = self._draw(batch, draws, _GLOBAL_STREAM, 2, self.tries, crops.global_crop)
        drawn = _with_whole_image(drawn, batch.source_size)
        shown = _choose(
            drawn, regions, whole, mask_size, batch.source_size, self.tries, self.min_visible, self.min_coverage
        )
        drawn = self._draw(batch, draws, _LOCAL_STREAM, crops.num_local, self.local_tries, crops.local_crop)
        local = _choose(
            drawn, regions, whole, mask_size, batch.source_size, self.local_tries, 0.0, self.local_min_coverage
        )

        in_masks = scale_boxes(shown.boxes_xyxy, batch.source_size.float(), mask_size)
        images = crops.global_crop.cut(batch.image, batch.source_size, shown.place)
        colors = self._color_draws(draws, batch.index, _GLOBAL_COLOR_STREAM, 2)
        moved = pixel_map(crops.global_recipes, images.shape[-3:], colors)
        pixels = self.grid if moved is None else images.shape[-2:]  # what moves is followed pixel by pixel
        covered = torch.cat(
            [regions.patch_fraction(boxes, flip, pixels) for boxes, flip in zip(in_masks, shown.flip, strict=True)]
        )
        if moved is not None:
            covered = F.avg_pool2d(moved.masks(covered[:, None])[:, 0], self.patch_size)
        attend = self.objects.patches(covered).flatten(1).unflatten(0, shown.flip.shape)
        global_valid, local_valid = (shown.coverage > 0) & attend.any(-1), local.coverage > 0
        if self.missing == "skip":
            global_valid, attend = global_valid & ~whole, attend & ~whole[:, None]
            local_valid = local_valid & ~whole
        masked = [self.masks(batch.index, draws, MASK_STREAM + view, self.grid) for view in range(2)]
        return ObjectCrops(
            images,
            crops.local_crop.cut(batch.image, batch.source_size, local.place),
            torch.stack(masked),
            attend,
            torch.cat([global_valid, local_valid]),
            shown.redraws,
            shown.fallback,
        )

    def finish(self, views: ObjectCrops, index: Int[Tensor, "B"], draws: Draws) -> ObjectCrops:
        """Colours of each crop by its recipe."""
        kinds = (
            (_GLOBAL_COLOR_STREAM, views.global_crops, self.crops.global_recipes),
            (_LOCAL_COLOR_STREAM, views.local_crops, self.crops.local_recipes),
        )
        global_crops, local_crops = (
            color_crops(crops, recipes, self._color_draws(draws, index, stream, len(recipes)), self.mean, self.std)
            for stream, crops, recipes in kinds
        )
        return views._replace(global_crops=global_crops, local_crops=local_crops)

    def _choose_object(self, batch: ObjectBatch, draws: Draws) -> Int[Tensor, "B"]:
        """The object of every image, or -1."""
        area = self.objects.area(batch)
        present = torch.arange(area.shape[1], device=area.device) < batch.num_objects[:, None]
        eligible = present & (area >= self.min_area) & (area > 0)
        return choose(self.choice(area, eligible), draws.uniform(batch.index, _OBJECT_STREAM, 1)[:, 0])

    def _draw(self, batch: ObjectBatch, draws: Draws, stream: int, views: int, tries: int, crop: RandomCrop) -> _Crops:
        """All crops that may be needed, in pixels of the image."""
        uniform = draws.uniform(batch.index, stream, views * tries * DRAWS_PER_CROP)
        uniform = uniform.view(len(batch.index), views * tries, DRAWS_PER_CROP).transpose(0, 1)
        places = crop.place(batch.source_size, uniform)
        return _Crops(*(each.transpose(0, 1).unflatten(1, (views, tries)) for each in places))

    def _color_draws(
        self, draws: Draws, index: Int[Tensor, "B"], stream: int, views: int
    ) -> Float[Tensor, "V B draws"]:
        uniform = draws.uniform(index, stream, views * DRAWS_PER_COLOR)
        return uniform.view(len(index), views, DRAWS_PER_COLOR).transpose(0, 1)


def _with_whole_image(drawn: _Crops, source_size: Float[Tensor, "B 2"]) -> _Crops:
    """One crop more: the whole image, mirrored as the first one drawn."""
    flip = drawn.flip[:, :, :1]
    whole = whole_image(source_size, flip[:, :, 0].transpose(0, 1)).boxes_xyxy.transpose(0, 1)[:, :, None]
    return _Crops(torch.cat([drawn.boxes_xyxy, whole], dim=2), torch.cat([drawn.flip, flip], dim=2))


def _choose(
    drawn: _Crops,
    regions: BoxRegions | MaskRegions,
    whole: Bool[Tensor, "B"],
    mask_size: Sequence[int],
    source_size: Float[Tensor, "B 2"],
    tries: int,
    min_visible: float,
    min_coverage: float,
) -> _Chosen:
    """One crop of each view: the first that shows the object; simply the first where the object is the whole image."""
    in_masks = scale_boxes(drawn.boxes_xyxy.movedim(0, 2), source_size.float(), mask_size).movedim(2, 0)
    inside = regions.area_in(in_masks.flatten(1, 2)).view(drawn.flip.shape)
    visible = inside / regions.area()[:, None, None]
    visible = torch.where(whole[:, None, None], 1.0, visible)
    left, top, right, bottom = in_masks.unbind(-1)
    coverage = inside / ((right - left) * (bottom - top))
    choice = choose_crop(visible.flatten(0, 1), coverage.flatten(0, 1), tries, min_visible, min_coverage)
    selected, good, redraws = (part.view(drawn.flip.shape[:2]) for part in choice)

    def taken(values: Tensor) -> Tensor:
        place = selected[..., None]
        return values.gather(2, place if values.ndim == 3 else place[..., None].expand(-1, -1, -1, 4))[:, :, 0]

    columns = (taken(drawn.boxes_xyxy), taken(drawn.flip), taken(coverage), redraws, ~good)
    return _Chosen(*(column.transpose(0, 1) for column in columns))
