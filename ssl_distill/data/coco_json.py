"""COCO's json: images, boxes, polygons and run-length codes."""

import math
import reprlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from PIL import Image, ImageDraw
from torch import Tensor

from ssl_distill.data.files import read_json
from ssl_distill.data.images import MOST_PIXELS
from ssl_distill.data.names import escaped

_FARTHEST = 1e7  # pixels: no picture is so large

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
        ValueError: If the json is no such json, names files that are not there, or has impossible boxes or masks.
        OSError: If it cannot be read.
    """
    content = read_json(annotations)
    if not isinstance(content, dict):
        raise ValueError(
            f"{annotations} must be COCO's json, an object with `images` and `annotations`, got {_short(content)}."
        )
    entries = _by_id(content, "images", annotations)
    for key, each in entries.items():
        _check_image(each, f"{annotations}: image {_short(key)}")
    sizes = {key: (int(each["height"]), int(each["width"])) for key, each in entries.items()}
    paths = {key: Path(images) / each["file_name"] for key, each in entries.items()}
    missing = [entries[key]["file_name"] for key, path in paths.items() if not is_there(path)]
    if missing:
        raise ValueError(
            f"`annotations` {annotations} names {len(missing)} of {len(paths)} files that are not in {images}, such as"
            f" {escaped(missing[0])}."
        )
    by_id = _by_id(content, "categories", annotations) if content.get("categories") else {}
    for key, each in by_id.items():
        if not isinstance(each.get("name"), str):
            raise ValueError(
                f"{annotations}: `name` of category {_short(key)} must be text, got {_short(each.get('name'))}."
            )
    if len({isinstance(key, str) for key in by_id}) > 1:
        raise ValueError(f"{annotations}: `id` must be a number in all categories or text in all, got both.")
    categories = [by_id[key] for key in sorted(by_id)]
    number = {each["id"]: label for label, each in enumerate(categories)}
    kept = {}  # by their position among all annotations
    for position, each in enumerate(_rows(content, "annotations", annotations)):
        score = each.get("score", math.inf)
        if not (score == math.inf or _is_number(score)):
            raise ValueError(
                f"{annotations}: `score` of annotation {_name(each, position)} must be a number, got {_short(score)}."
            )
        if not each.get("iscrowd") and score >= min_score:
            kept[position] = each
    _check_boxes(kept, sizes, annotations)
    for position, each in kept.items():
        category = each.get("category_id")
        if category is not None and not (_is_id(category) and (category in number or not number)):
            raise ValueError(
                f"{annotations}: `category_id` of annotation {_name(each, position)} must be the id of one of its"
                f" {len(number)} categories, got {_short(category)}."
            )
        what = f"{annotations}: mask of annotation {_name(each, position)}"
        _check_segmentation(each.get("segmentation"), sizes[each["image_id"]], what)

    groups: dict[Any, dict[Any, list[CocoObject]]] = defaultdict(lambda: defaultdict(list))
    dropped = []
    for position, each in kept.items():
        box = _clip(each["bbox"], *sizes[each["image_id"]])
        if box is None:
            dropped.append(_name(each, position))
            continue
        category = number.get(each.get("category_id"), -1)
        key = category if object_unit == "category" and category >= 0 else f"#{position}"
        item = CocoObject(box, category, each.get("segmentation") or None, _name(each, position))
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


def _rows(content: dict[str, Any], key: str, source: str) -> list[dict[str, Any]]:
    rows = content.get(key)
    if not isinstance(rows, list):
        raise ValueError(f"{source} must be COCO's json with a list `{key}`, got {_short(rows)}.")
    for position, each in enumerate(rows):
        if not isinstance(each, dict):
            raise ValueError(f"{source}: entry {position} of `{key}` must be an object, got {_short(each)}.")
    return rows


def _by_id(content: dict[str, Any], key: str, source: str) -> dict[Any, dict[str, Any]]:
    entries: dict[Any, dict[str, Any]] = {}
    for position, each in enumerate(_rows(content, key, source)):
        if not _is_id(each.get("id")):
            raise ValueError(
                f"{source}: `id` of entry {position} of `{key}` must be a number or text, got {_short(each.get('id'))}."
            )
        if each["id"] in entries:
            raise ValueError(f"{source}: `id` {_short(each['id'])} is given twice in `{key}`; each needs its own.")
        entries[each["id"]] = each
    return entries


def _check_image(entry: dict[str, Any], what: str) -> None:
    if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
        raise ValueError(f"{what} must have a `file_name`, got {_short(entry.get('file_name'))}.")
    for side in ("height", "width"):
        if not _is_number(entry.get(side)) or entry[side] < 1 or int(entry[side]) != entry[side]:
            raise ValueError(f"{what} must have a `{side}` in whole pixels, got {_short(entry.get(side))}.")
    if entry["height"] * entry["width"] > MOST_PIXELS:
        raise ValueError(f"{what} must have at most {MOST_PIXELS:,} pixels, got {entry['width']} x {entry['height']}.")


def _check_segmentation(segmentation: Any, image_size: tuple[int, int], what: str) -> None:
    """Refuse what is neither polygons nor a run-length code of the image's size."""
    if not segmentation:
        return
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if not isinstance(size, list) or len(size) != 2 or not all(map(_is_number, size)):
            raise ValueError(f"{what} must have a `size` of height and width, got {_short(size)}.")
        if tuple(size) != image_size:
            raise ValueError(
                f"{what} must be as large as its image, {image_size[1]} x {image_size[0]}, got {size[1]} x {size[0]}."
            )
        if isinstance(counts, list):
            if not set(map(type, counts)) <= {int} or min(counts, default=0) < 0:
                raise ValueError(f"{what} must have `counts` of whole numbers from 0 on, got {_short(counts)}.")
            if sum(counts) != math.prod(image_size):
                raise ValueError(f"{what} must have {math.prod(image_size)} pixels, got {_short(sum(counts))}.")
        elif not isinstance(counts, str):
            raise ValueError(f"{what} must have `counts`, a list or text, got {_short(counts)}.")
        else:
            _coco_mask(what)
        return
    if not isinstance(segmentation, list):
        raise ValueError(f"{what} must be polygons or a run-length code, got {_short(segmentation)}.")
    for polygon in segmentation:
        # Types and extremes by the interpreter's own loops: COCO has 40 million such numbers.
        if (
            not isinstance(polygon, list)
            or len(polygon) < 4
            or len(polygon) % 2
            or not set(map(type, polygon)) <= {int, float}
            or not (min(polygon) > -_FARTHEST and max(polygon) < _FARTHEST and -math.inf < sum(polygon) < math.inf)
        ):
            raise ValueError(f"{what} must be polygons [x, y, x, y, ...] of finite numbers, got {_short(polygon)}.")


def _is_number(value: Any) -> bool:
    """Whether it is a finite number of a size that a picture can have."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_FARTHEST < value < _FARTHEST


def _is_id(value: Any) -> bool:
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _name(annotation: dict[str, Any], position: int) -> str:
    """What to call an annotation in messages."""
    return _short(annotation["id"]) if "id" in annotation else f"number {position}"


def _short(value: Any) -> str:
    return reprlib.repr(value)


def _check_boxes(annotations: dict[int, dict[str, Any]], sizes: dict[Any, tuple[int, int]], source: str) -> None:
    """Refuse boxes that are no numbers, belong to no image or are given by two corners."""
    beyond = corners = count = 0
    for position, each in annotations.items():
        image = each.get("image_id")
        if not _is_id(image) or image not in sizes:
            raise ValueError(
                f"{source}: annotation {_name(each, position)} is of image {_short(image)}, not in images."
            )
        box = each.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise ValueError(
                f"{source}: `bbox` of annotation {_name(each, position)} must be 4 finite numbers, got {_short(box)}."
            )
        height, width = sizes[image]
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
        ValueError: If a compressed run-length code is damaged.
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
    if isinstance(code["counts"], list):
        values = np.arange(len(code["counts"])) % 2 == 1
        return np.repeat(values, code["counts"]).reshape(image_size[::-1]).T
    try:
        return (
            _coco_mask(f"mask of annotation {part.id}").decode({**code, "counts": code["counts"].encode()}).astype(bool)
        )
    except Exception as error:  # what is raised on damaged codes has no common type
        raise ValueError(f"mask of annotation {part.id} is no run-length code: {error}.") from error


def _coco_mask(what: str) -> Any:
    """The module that reads compressed masks.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ValueError(
            f"{what} is compressed: it needs pycocotools; run `pip install ssl-distill[detection]`."
        ) from error
    return mask
