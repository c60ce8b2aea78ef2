"""Images with boxes and masks, as torchvision's detectors take them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_distill.data.coco_json import rasterize, read_coco
from ssl_distill.data.corrupt import OnCorrupt, Replacement
from ssl_distill.data.images import read_image
from ssl_distill.data.loader_process import outlive_requests
from ssl_distill.data.shapes import SHAPES, ShapesData

Example = tuple[Tensor, dict[str, Tensor]]
"""An image (3, H, W) in [0, 1]; its `boxes` (n, 4) in pixels, `labels` (n) from 1 on, `masks` (n, H, W) of 0 and 1."""


class ShapeScenes(Dataset):
    """Scenes of `ShapesData`, of which there is no end.

    Args:
        data: In mode "scene".
        count: How many.
        first: Number of the first; methods are trained on those below `data.num_images`.
    """

    class_names = ("background", *SHAPES)

    def __init__(self, data: ShapesData, count: int, first: int = 0) -> None:
        if data.mode != "scene":
            raise ValueError(f"`data` must have the mode scene, whose pictures have boxes, got {data.mode}.")
        for name, value, least in (("count", count, 1), ("first", first, 0)):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        self.data = data
        self.count = count
        self.first = first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> Example:
        if item >= self.count:
            raise IndexError(item)
        sample = self.data.sample(self.first + item)
        seen = sample.masks.any(2).any(1)  # an object may be hidden by later ones
        boxes = sample.boxes_xyxy[seen] * sample.image.shape[-1]
        labels = sample.labels[seen] + 1  # detectors keep 0 for the background
        return sample.image / 255, {"boxes": boxes, "labels": labels, "masks": sample.masks[seen].byte()}


class CocoBoxes(Dataset):
    """Images and objects of any COCO-style json; crowds and empty boxes are left out.

    Args:
        images: Folder of the images.
        annotations: The json file.
        on_corrupt: As in `CocoObjectsData`.

    Attributes:
        class_names: Names of the classes; label 0 is the background.

    Raises:
        ValueError: If the json is not in COCO's format, or objects have no category.
    """

    def __init__(self, images: str | Path, annotations: str | Path, on_corrupt: OnCorrupt = "skip") -> None:
        if not Path(annotations).is_file():
            raise ValueError(f"`annotations` {annotations} does not exist; give a json in COCO's format.")
        self._images, names = read_coco(str(annotations), str(images))
        if any(part.category < 0 for image in self._images for (part,) in image.objects):
            raise ValueError(f"`annotations` {annotations} must give every object a `category_id` of its categories.")
        self.class_names = ("background", *names)
        self.replacement = Replacement(len(self._images), on_corrupt)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, item: int) -> Example:
        return self.replacement.read(item, self._read)[0]

    def _read(self, item: int) -> Example:
        image = self._images[item]
        size = (image.height, image.width)
        pixels = read_image(image.path)
        if pixels.shape[1:] != size:
            raise ValueError(
                f"{image.path} is {pixels.shape[2]} x {pixels.shape[1]} pixels, not {size[1]} x {size[0]}."
            )
        boxes = torch.tensor([part.box_xyxy for (part,) in image.objects], dtype=torch.float32).view(-1, 4)
        labels = torch.tensor([part.category + 1 for (part,) in image.objects], dtype=torch.long)
        masks = [rasterize(parts, size, size).byte() for parts in image.objects]
        masks_of_all = torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8)
        return pixels / 255, {"boxes": boxes, "labels": labels, "masks": masks_of_all}


class DetectionData(LightningDataModule):
    """Training and validation images of a detector.

    Args:
        train: To train on, such as `ShapeScenes` or `CocoBoxes`.
        val: To measure on.
        batch_size: Training images per rank.
        num_workers: Loader processes.

    Raises:
        ValueError: If the two know different classes.
    """

    def __init__(self, train: Dataset, val: Dataset, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        classes, val_classes = (getattr(part, "class_names", None) for part in (train, val))
        if classes != val_classes:
            raise ValueError(f"`val` must have the classes of `train`, {classes}, got {val_classes}.")
        self.train = train
        self.val = val
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        return detection_loader(self.train, self.batch_size, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """Batches in order."""
        return detection_loader(self.val, self.batch_size, shuffle=False, num_workers=self.num_workers)


def detection_loader(examples: Dataset, batch_size: int, shuffle: bool, num_workers: int = 0) -> DataLoader:
    """Batches as lists of images and of targets, since sizes differ."""
    return DataLoader(
        examples, batch_size, shuffle, num_workers=num_workers, collate_fn=_as_lists, worker_init_fn=outlive_requests
    )


def _as_lists(examples: Sequence[Example]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images, targets = zip(*examples, strict=True)
    return list(images), list(targets)
