"""COCO's json: images, boxes, polygons and run-length codes."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from PIL import Image, ImageDraw
from torch import Tensor

ObjectUnit = Literal["instance", "category"]
Box = tuple[float, float, float, float]


class CocoObject(NamedTuple):
    """One object, in pixels of its image.

    Attributes:
        box_xyxy: Left, top, right, bottom, inside the image.
        category: Number of its category, or -1.
        segmentation: Polygons [[x, y, x, y, ...], ...], a run-length code, or None: the box.
        id: What the json calls it.
    """

    box_xyxy: Box
    category: int
    segmentation: Any
    id: str


class CocoImage(NamedTuple):
    """One image file and its objects; each object is a group of annotations, usually of one."""

    path: Path
    height: int
    width: int
    objects: list[list[CocoObject]]


def read_coco(
    annotations: str,
    images: str,
    object_unit: ObjectUnit = "instance",
    min_score: float = 0.3,
    is_there: Callable[[Path], bool] = Path.is_file,
) -> tuple[list[CocoImage], tuple[str, ...]]:
    """Images with their objects, the largest first, and the names of the categories.

    Arguments as in `CocoObjectsData`; `is_there` tells of a path in `images` whether there is such an image.

    Raises:
        ValueError: If the json is no such json, names files that are not there, or has impossible boxes.
    """
    try:
        content = json.loads(Path(annotations).read_text(encoding="utf-8"))
        entries, boxes = {each["id"]: each for each in content["images"]}, content["annotations"]
        sizes = {key: (int(each["height"]), int(each["width"])) for key, each in entries.items()}
        paths = {key: Path(images) / each["file_name"] for key, each in entries.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`annotations` {annotations} must be COCO's json with images (id, file_name, height, width) and"
            f" annotations (image_id, bbox): {type(error).__name__} {error}."
        ) from error
    missing = [entries[key]["file_name"] for key, path in paths.items() if not is_there(path)]
    if missing:
        raise ValueError(
            f"`annotations` {annotations} names {len(missing)} of {len(paths)} files that are not in {images}, such as"
            f" {missing[0]}."
        )
    categories = sorted(content.get("categories", []), key=lambda each: each["id"])
    number = {each["id"]: label for label, each in enumerate(categories)}
    kept = [each for each in boxes if not each.get("iscrowd") and each.get("score", math.inf) >= min_score]
    _check_boxes(kept, sizes, annotations)

    groups: dict[Any, dict[Any, list[CocoObject]]] = defaultdict(lambda: defaultdict(list))
    dropped = []
    for position, each in enumerate(kept):
        box = _clip(each["bbox"], *sizes[each["image_id"]])
        if box is None:
            dropped.append(each.get("id", position))
            continue
        category = number.get(each.get("category_id"), -1)
        key = category if object_unit == "category" and category >= 0 else f"#{position}"
        item = CocoObject(box, category, each.get("segmentation") or None, str(each.get("id", position)))
        groups[each["image_id"]][key].append(item)
    if dropped:
        rank_zero_warn(
            f"{len(dropped)} of {len(kept)} boxes in {annotations} show less than a pixel of their image, such as that"
            f" of annotation {dropped[0]}: dropped."
        )
    found = [
        CocoImage(paths[key], *sizes[key], sorted(groups[key].values(), key=_area, reverse=True)) for key in entries
    ]
    empty = sum(not image.objects for image in found)
    rank_zero_info(f"{len(found)} images in {annotations}, {empty} without objects")
    if not found or empty == len(found):
        raise ValueError(f"`annotations` {annotations} must name images with objects, {len(found)} images have none.")
    return found, tuple(each["name"] for each in categories)


def _check_boxes(annotations: Iterable[dict[str, Any]], sizes: dict[Any, tuple[int, int]], source: str) -> None:
    """Refuse boxes that are no numbers, belong to no image or are given by two corners."""
    beyond = corners = count = 0
    for each in annotations:
        if each.get("image_id") not in sizes:
            raise ValueError(
                f"{source}: annotation {each.get('id')} is of image {each.get('image_id')}, not in images."
            )
        box = each.get("bbox", ())
        if len(box) != 4 or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in box):
            raise ValueError(f"{source}: `bbox` of annotation {each.get('id')} must be 4 finite numbers, got {box}.")
        height, width = sizes[each["image_id"]]
        x, y, third, fourth = box
        count += 1
        beyond += x + third > width + 1 or y + fourth > height + 1
        corners += x < third <= width + 1 and y < fourth <= height + 1
    # Boxes given by corners, read as x, y, width, height, end beyond the image more often than not.
    if count and beyond > count / 4 and corners > 0.95 * count:
        raise ValueError(
            f"{source}: `bbox` must be x, y, width, height; {beyond} of {count} end outside their image and would lie"
            " inside as x1, y1, x2, y2: convert them."
        )


def _clip(box_xywh: Sequence[float], height: int, width: int) -> Box | None:
    """Corners inside the image, or None if less than a pixel is left in either direction."""
    x, y, box_width, box_height = box_xywh
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + box_width, float(width)), min(y + box_height, float(height))
    return (left, top, right, bottom) if right - left >= 1 and bottom - top >= 1 else None


def _area(parts: Sequence[CocoObject]) -> float:
    return sum((part.box_xyxy[2] - part.box_xyxy[0]) * (part.box_xyxy[3] - part.box_xyxy[1]) for part in parts)


def bounds(parts: Sequence[CocoObject]) -> Box:
    """The smallest box around all parts of an object."""
    left, top, right, bottom = zip(*(part.box_xyxy for part in parts), strict=True)
    return min(left), min(top), max(right), max(bottom)


def rasterize(
    parts: Sequence[CocoObject], image_size: tuple[int, int], mask_size: tuple[int, int]
) -> Bool[Tensor, "H W"]:
    """Pixels of an object in its image squashed to `mask_size`; sizes are height and width.

    Raises:
        ValueError: If a run-length code is of an image of another size, or compressed and pycocotools is missing.
    """
    mask = Image.new("1", mask_size[::-1])
    pen = ImageDraw.Draw(mask)
    scale = np.array([mask_size[1] / image_size[1], mask_size[0] / image_size[0]])
    for part in parts:
        if isinstance(part.segmentation, dict):
            mask.paste(1, mask=Image.fromarray(_decode(part, image_size)).resize(mask.size, Image.Resampling.NEAREST))
        elif part.segmentation is not None:
            for polygon in part.segmentation:
                # PIL draws the pixels on a polygon's edge too; corners are given between pixels.
                pen.polygon([tuple(point) for point in np.reshape(polygon, (-1, 2)) * scale - 0.5], fill=1)
        else:
            left, top, right, bottom = (np.reshape(part.box_xyxy, (2, 2)) * scale).round().ravel()
            pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), fill=1)
    return torch.from_numpy(np.array(mask))


def _decode(part: CocoObject, image_size: tuple[int, int]) -> np.ndarray:
    """Pixels of a run-length code: lengths of runs of 0 and 1 in turn, column by column."""
    code = part.segmentation
    if tuple(code["size"]) != image_size:
        raise ValueError(
            f"mask of annotation {part.id} must be as large as its image, {image_size[1]} x {image_size[0]}, got"
            f" {code['size'][1]} x {code['size'][0]}."
        )
    if isinstance(code["counts"], list):
        values = np.arange(len(code["counts"])) % 2 == 1
        flat = np.repeat(values, code["counts"])
        if len(flat) != math.prod(image_size):
            raise ValueError(f"mask of annotation {part.id} must have {math.prod(image_size)} pixels, got {len(flat)}.")
        return flat.reshape(image_size[::-1]).T
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ValueError("compressed masks need pycocotools; run `pip install ssl-distill[detection]`.") from error
    return coco_mask.decode({**code, "counts": code["counts"].encode()}).astype(bool)
