"""Images with the places of their objects, from COCO's json or a detector's boxes."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from ssl_distill.data.batch import LabelledImages, ObjectBatch, source_sizes
from ssl_distill.data.coco_json import CocoImage, ObjectUnit, bounds, rasterize, read_coco
from ssl_distill.data.corrupt import OnCorrupt, Replacement, check_on_corrupt
from ssl_distill.data.images import decode, evaluation_view
from ssl_distill.data.module import BatchSet, ImageData, ImageParts
from ssl_distill.data.object_labels import LabelledObjectBatch
from ssl_distill.data.sources import FileSource, ImageSource, open_packed, shards_in


class CocoObjectsData(ImageData):
    """Images with boxes or masks of their objects.

    The json is COCO's (`images`, `annotations` and, if known, `categories`; boxes as x, y, width, height), with
    polygons, run-length codes or boxes alone. A detector's boxes fit too: an annotation needs only `image_id` and
    `bbox`, and those whose `score` is too low are left out. Crowds are left out. Boxes are clipped to their image and
    dropped if less than a pixel is left.

    Args:
        images: Folder that the file names in the json are relative to; or that folder as `ssl-distill data optimize`
            made shards of it; or a .tar of what is in it, or a folder of such tars.
        annotations: The json.
        val_images: The same for the queries; None takes a fifth of `images`.
        val_annotations: Json of the queries; given with `val_images`.
        object_unit: "instance" takes each annotation as an object, "category" all of a category together.
        min_score: Least score of a detected box.
        max_objects: Most objects of an image, M; the largest are kept.
        decode_size: Side of the squares that masks of objects are kept at, and that an `augment` of one's own gets, if
            it is no `ViewAugment`.
        eval_size: Side of evaluation images. Evaluation is of every image's largest object, if it has one.
        batch_size: Training images per rank.
        num_workers: Loader processes.
        eval_batch_size: Images per evaluation batch and rank.
        bank_size: Most images that evaluators learn from.
        query_size: Most images that evaluators predict.
        seed: Of the order of training images; None is the run's.
        on_corrupt: "skip" names a picture that cannot be read, or is of another size than its annotations, once, counts
            it and takes the next image in its place, and stops when more than 10 and 1 % of all are so; "error" stops
            at the first. Pictures that are missing are an error from the start.
    """

    def __init__(
        self,
        images: str,
        annotations: str,
        val_images: str | None = None,
        val_annotations: str | None = None,
        object_unit: ObjectUnit = "instance",
        min_score: float = 0.3,
        max_objects: int = 10,
        decode_size: int = 256,
        eval_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 2,
        eval_batch_size: int = 64,
        bank_size: int = 10_000,
        query_size: int = 2_000,
        seed: int | None = None,
        on_corrupt: OnCorrupt = "skip",
    ) -> None:
        super().__init__(batch_size, num_workers, decode_size, eval_size, eval_batch_size, bank_size, query_size, seed)
        check_on_corrupt(on_corrupt)
        if max_objects < 1:
            raise ValueError(f"`max_objects` must be at least 1, got {max_objects}.")
        if object_unit not in get_args(ObjectUnit):
            raise ValueError(f"`object_unit` must be one of {', '.join(get_args(ObjectUnit))}, got {object_unit}.")
        if (val_images is None) != (val_annotations is None):
            raise ValueError("`val_images` and `val_annotations` must be given together, got only one of them.")
        for name, path in {"images": images, "val_images": val_images}.items():
            if path is not None and not Path(path).is_dir() and not shards_in(Path(path)):
                raise ValueError(f"`{name}` must be a folder of images or of shards, or a .tar, {path} is none.")
        for name, path in {"annotations": annotations, "val_annotations": val_annotations}.items():
            if path is not None and not Path(path).is_file():
                raise ValueError(f"`{name}` must be a json file, {path} does not exist.")
        self.images, self.annotations = images, annotations
        self.val_images, self.val_annotations = val_images, val_annotations
        self.object_unit: ObjectUnit = object_unit
        self.min_score = min_score
        self.max_objects = max_objects
        self.on_corrupt = on_corrupt

    def load(self) -> ImageParts:
        """Read the annotations and check that the images are there."""
        files, names = self._files(self.annotations, self.images)
        self.class_names, self.num_classes = names, len(names) or None
        pictures = [str(image.path.relative_to(self.images)) for image in files.images]
        lie_in = [files.source.file(position) for position in files.in_source]
        self.training_files = ["annotations", *pictures], [self.annotations, *lie_in]
        bank: Sequence[int] = files.with_objects()
        if self.val_images and self.val_annotations:
            val_files, val_names = self._files(self.val_annotations, self.val_images)
            if val_names != names:
                raise ValueError(f"`val_annotations` {self.val_annotations} must have the categories of `annotations`.")
            queries: Sequence[int] = val_files.with_objects()
        else:
            val_files, queries = files, bank[::5]
            bank = sorted(set(bank) - set(queries)) or bank
        return ImageParts(
            BatchSet(files.object_batch, range(len(files.images))),
            BatchSet(files.labelled_batch, bank[: self.bank_size]),
            BatchSet(val_files.labelled_batch, queries[: self.query_size]),
            BatchSet(files.labelled_images, bank[: self.bank_size]),
        )

    def _files(self, annotations: str, images: str) -> tuple["CocoFiles", tuple[str, ...]]:
        """The annotated images, and the names of the categories."""
        source: ImageSource
        in_source: Sequence[int]
        if packed := open_packed(Path(images)):
            source, _ = packed
            position_of = {Path(images, name): position for position, name in enumerate(source.names)}
            if len(position_of) < len(source.names):
                twice = next(name for i, name in enumerate(source.names) if position_of[Path(images, name)] != i)
                raise ValueError(f"{images} holds several images of one name, such as {twice}; give each its own.")
            found, names = read_coco(
                annotations, images, self.object_unit, self.min_score, is_there=position_of.__contains__
            )
            in_source = [position_of[image.path] for image in found]
        else:
            found, names = read_coco(annotations, images, self.object_unit, self.min_score)
            source = FileSource([str(image.path) for image in found])
            in_source = range(len(found))
        sizes = (self.max_objects, self.decode_size, self.eval_size)
        return CocoFiles(found, source, in_source, *sizes, self.on_corrupt), names


class CocoFiles:
    """Annotated image files, read when asked for.

    Args:
        images: The files.
        source: Where they lie.
        in_source: Position of each file there.
        max_objects: M.
        mask_size: Side of the masks of training images.
        eval_size: Side of evaluation images.
        on_corrupt: As in `Replacement`.
    """

    def __init__(
        self,
        images: Sequence[CocoImage],
        source: ImageSource,
        in_source: Sequence[int],
        max_objects: int,
        mask_size: int,
        eval_size: int,
        on_corrupt: OnCorrupt,
    ) -> None:
        self.images = images
        self.source = source
        self.in_source = in_source
        self.max_objects = max_objects
        self.mask_size = mask_size
        self.eval_size = eval_size
        self.replacement = Replacement(len(images), on_corrupt)

    def with_objects(self) -> list[int]:
        """Positions of images that have objects."""
        return [position for position, image in enumerate(self.images) if image.objects]

    def object_batch(self, positions: Sequence[int]) -> ObjectBatch:
        """Whole images with their objects."""
        read = (self.replacement.read(position, self._with_masks) for position in positions)
        samples, used = zip(*read, strict=True)
        pictures, boxes, masks = zip(*samples, strict=True)
        counts = torch.tensor([min(len(self.images[i].objects), self.max_objects) for i in used])
        sizes = source_sizes(list(pictures))
        return ObjectBatch(
            list(pictures), sizes, torch.as_tensor(positions), torch.stack(boxes), counts, torch.stack(masks)
        )

    def labelled_batch(self, positions: Sequence[int]) -> LabelledObjectBatch:
        """Central squares, with the largest object of each."""
        read = (self.replacement.read(position, self._with_mask, self._has_objects) for position in positions)
        samples, used = zip(*read, strict=True)
        views, masks = zip(*samples, strict=True)
        return LabelledObjectBatch(
            torch.stack(views), self._labels(used), torch.as_tensor(positions), torch.stack(masks)
        )

    def labelled_images(self, positions: Sequence[int]) -> LabelledImages:
        """Whole images, with the class of the largest object of each."""
        read = (self.replacement.read(position, self._pixels, self._has_objects) for position in positions)
        pictures, used = zip(*read, strict=True)
        return LabelledImages(list(pictures), self._labels(used), torch.as_tensor(positions))

    def _has_objects(self, position: int) -> bool:
        return bool(self.images[position].objects)

    def _labels(self, positions: Sequence[int]) -> Tensor:
        return torch.tensor([self.images[position].objects[0][0].category for position in positions])

    def _with_masks(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """A whole image, and boxes and masks of its objects."""
        image, pixels = self.images[position], self._pixels(position)
        boxes = torch.zeros(self.max_objects, 4)
        masks = torch.zeros(self.max_objects, self.mask_size, self.mask_size, dtype=torch.bool)
        scale = torch.tensor([image.width, image.height] * 2)
        for place, parts in enumerate(image.objects[: self.max_objects]):
            boxes[place] = torch.tensor(bounds(parts)) / scale
            masks[place] = rasterize(parts, (image.height, image.width), (self.mask_size, self.mask_size))
        return pixels, boxes, masks

    def _with_mask(self, position: int) -> tuple[Tensor, Tensor]:
        """The central square of an image, and of the mask of its largest object."""
        image, pixels = self.images[position], self._pixels(position)
        whole = (image.height, image.width)
        mask = rasterize(image.objects[0], whole, whole).to(torch.uint8) * 255
        mask = evaluation_view(mask.expand(3, -1, -1), self.eval_size)[0] > 127
        return evaluation_view(pixels, self.eval_size), mask

    def _pixels(self, position: int) -> Tensor:
        image, place = self.images[position], self.in_source[position]
        where = self.source.where(place)
        pixels = decode(self.source.read(place), where)
        if pixels.shape[1:] != (image.height, image.width):
            raise ValueError(
                f"{where} is {pixels.shape[2]} x {pixels.shape[1]} pixels, its annotations are for {image.width} x"
                f" {image.height}; was it resized, or turned by its EXIF tag?"
            )
        return pixels
