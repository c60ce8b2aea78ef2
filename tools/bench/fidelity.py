"""How sharp the crops of every recipe are beside the official pipelines', and what other ways of cutting them cost.

Run: python tools/bench/fidelity.py DIR [--photographs 100] [--draws 4]
DIR: photographs of 1,600 pixels or more, such as Debian's packages plasma-workspace-wallpapers,
lomiri-wallpapers-16.04, lomiri-wallpapers-20.04 and ukui-wallpapers give in /usr/share.
Protocol: photographs are shrunk (PIL, Lanczos) to a longer side of 400 to 2,000 pixels, evenly spread, and saved as
JPEG of quality 90. Official: `RandomResizedCrop` and flip of torchvision on PIL images, with the numbers and the filter
of the official code. Ours: what a loader process cuts for the method, with draws of its own. The statistic is the mean
over crops of the variance of the second difference of the grey value: in both axes together (Laplacian) and in each;
its standard error is over photographs. "Upsampled" is the share of crops that are smaller in the file than in the view,
in either axis.
Ways are compared on the same boxes, one thread, CPU time of one process.
"""

import argparse
import io
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomHorizontalFlip, RandomResizedCrop

from ssl_distill.augment.aligned_crop import AlignedCropAugment
from ssl_distill.augment.base import ViewAugment
from ssl_distill.augment.crops import RandomCrop, cut_crops, whole_image
from ssl_distill.augment.geometry import DRAWS_PER_CROP, CropBoxes, scale_boxes
from ssl_distill.augment.masked_crop import MaskedCropAugment
from ssl_distill.augment.masked_image import MaskedImageAugment
from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.augment.object_crop import ObjectCropAugment
from ssl_distill.augment.two_view import TwoViewAugment
from ssl_distill.data.batch import ImageBatch, LabelledImages, ObjectBatch, source_sizes
from ssl_distill.data.images import decode
from ssl_distill.draws import Draws
from ssl_distill.evaluate.probe_crop import ProbeCrop

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR


class Official(NamedTuple):
    """Numbers of an official pipeline."""

    size: int
    scale: tuple[float, float]
    filter: InterpolationMode = BICUBIC


class Recipe(NamedTuple):
    """One kind of crop of one method: our field of the views, and the official numbers."""

    method: str
    augment: Callable[[], ViewAugment]
    field: str
    official: Official


def _anywhere() -> ObjectCropAugment:
    return ObjectCropAugment(min_visible=0.0, min_coverage=0.0, local_min_coverage=0.0)  # any crop: the law of iBOT


def _mokd() -> MultiCropAugment:
    return MultiCropAugment(global_scale=(0.25, 1.0), local_scale=(0.05, 0.25))


RECIPES = (
    Recipe("DINO", MultiCropAugment, "global_crops", Official(224, (0.4, 1.0))),
    Recipe("DINO", MultiCropAugment, "local_crops", Official(96, (0.05, 0.4))),
    Recipe("iBOT", MaskedCropAugment, "global_crops", Official(224, (0.25, 1.0))),
    Recipe("iBOT", MaskedCropAugment, "local_crops", Official(96, (0.05, 0.25))),
    Recipe("ODIS", _anywhere, "global_crops", Official(224, (0.25, 1.0))),
    Recipe("ODIS", _anywhere, "local_crops", Official(96, (0.05, 0.25))),
    Recipe("UDI", AlignedCropAugment, "global_crops", Official(224, (0.25, 1.0))),
    Recipe("UDI", AlignedCropAugment, "local_crops", Official(96, (0.05, 0.25))),
    Recipe("MOKD", _mokd, "global_crops", Official(224, (0.25, 1.0))),
    Recipe("MOKD", _mokd, "local_crops", Official(96, (0.05, 0.25))),
    Recipe("dBOT", MaskedImageAugment, "images", Official(224, (0.2, 1.0))),
    Recipe("PCD", TwoViewAugment, "images", Official(224, (0.08, 1.0), BILINEAR)),
    Recipe("probe", ProbeCrop, "image", Official(224, (0.08, 1.0), BILINEAR)),
    Recipe("fine-tuning", lambda: ProbeCrop(filter="bicubic"), "image", Official(224, (0.08, 1.0))),
)


def photographs(folder: Path, count: int) -> list[bytes]:
    """JPEGs of 400 to 2,000 pixels."""
    files = [each for each in sorted(folder.rglob("*")) if each.suffix.lower() in {".jpg", ".jpeg", ".png"}]
    files = [each for each in files if each.is_file() and not each.is_symlink()]
    random.Random(0).shuffle(files)
    found: list[bytes] = []
    for file in files:
        with Image.open(file) as opened:
            if max(opened.size) < 1600 or opened.size[0] * opened.size[1] > 5e7:
                continue
            image = opened.convert("RGB")
        longer = 400 + 1600 * len(found) / max(count - 1, 1)
        shrink = min(1.0, longer / max(image.size))
        image = image.resize([round(side * shrink) for side in image.size], Image.Resampling.LANCZOS)
        content = io.BytesIO()
        image.save(content, "jpeg", quality=90)
        found.append(content.getvalue())
        if len(found) == count:
            break
    if len(found) < count:
        raise ValueError(f"`--photographs` must be at most {len(found)}, those of 1,600 pixels in {folder}.")
    return found


def sharpness(crops: Tensor) -> Tensor:
    """Variance of the second difference of each crop (N, 3, H, W): of both axes together, down, across."""
    gray = crops.to(torch.float64).mean(1)
    down = (gray[:, 2:] - 2 * gray[:, 1:-1] + gray[:, :-2])[:, :, 1:-1]
    across = (gray[:, :, 2:] - 2 * gray[:, :, 1:-1] + gray[:, :, :-2])[:, 1:-1]
    return torch.stack([each.flatten(1).var(1) for each in (down + across, down, across)])


def batch_for(augment: ViewAugment, images: list[Tensor], index: Tensor) -> ImageBatch | ObjectBatch | LabelledImages:
    """Whole images as the augmentation takes them; to ODIS without objects, so that its crops lie anywhere."""
    if isinstance(augment, ProbeCrop):
        return LabelledImages(images, torch.zeros_like(index), index)
    if isinstance(augment, ObjectCropAugment):
        nothing = torch.zeros(len(images), 1, 4), torch.zeros_like(index), torch.zeros(len(images), 1, 8, 8).bool()
        return ObjectBatch(images, source_sizes(images), index, *nothing)
    return ImageBatch(images, source_sizes(images), index)


def ours(recipe: Recipe, images: list[Tensor], draws: int) -> Tensor:
    """Sharpness (3, images, crops) of what loader processes would cut."""
    augment, index = recipe.augment(), torch.arange(len(images))
    rows = []
    for epoch in range(draws):
        crops = getattr(augment.cut(batch_for(augment, images, index), Draws(0, epoch)), recipe.field)
        rows.append(sharpness(crops.flatten(0, -4)).view(3, -1, len(images)).mT)
    return torch.cat(rows, 2)


def officials(recipe: Recipe, images: list[Image.Image], draws: int) -> tuple[Tensor, float]:
    """Sharpness (3, images, crops) by the official numbers, and the share of upsampled crops."""
    size, scale, kernel = recipe.official
    crop, flip = RandomResizedCrop(size, scale, interpolation=kernel), RandomHorizontalFlip()
    torch.manual_seed(1)
    rows, upsampled = [], []
    for image in images:
        for _ in range(draws * (2 if size == 224 else 8)):
            box = RandomResizedCrop.get_params(image, list(scale), list(crop.ratio))
            upsampled.append(min(box[2], box[3]) < size)
            cut = flip(image.crop((box[1], box[0], box[1] + box[3], box[0] + box[2])))
            cut = cut.resize((size, size), Image.Resampling.BICUBIC if kernel is BICUBIC else Image.Resampling.BILINEAR)
            rows.append(sharpness(torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None]))
    return torch.cat(rows, 1).view(3, len(images), -1), sum(upsampled) / len(upsampled)


def recipes(contents: list[bytes], draws: int) -> None:
    """Print our statistic over the official one for each recipe."""
    images = [decode(content, "photograph") for content in contents]
    pil = [Image.open(io.BytesIO(content)).convert("RGB") for content in contents]
    print(f"{'recipe':14}{'crops':14}{'Laplacian':>10}{'down':>8}{'across':>8}{'+- (se)':>9}{'upsampled':>11}")
    for recipe in RECIPES:
        mine, (theirs, upsampled) = ours(recipe, images, draws), officials(recipe, pil, draws)
        ratio = mine.mean((1, 2)) / theirs.mean((1, 2))
        apart = mine[0].mean(1) - ratio[0] * theirs[0].mean(1)  # of each photograph
        error = apart.std() / theirs[0].mean() / len(images) ** 0.5
        print(
            f"{recipe.method:14}{recipe.field:14}{ratio[0]:10.3f}{ratio[1]:8.3f}{ratio[2]:8.3f}{error:9.3f}"
            f"{upsampled:11.2f}",
            flush=True,
        )


def ways(contents: list[bytes]) -> None:
    """Print sharpness, bytes and CPU time an image of other ways, on the crops of DINO and PCD."""
    generator = torch.Generator().manual_seed(0)
    print(f"\n{'way':34}{'DINO global':>12}{'local':>8}{'PCD':>8}{'kB':>8}{'ms':>8}")
    full = [decode(content, "photograph") for content in contents]
    kinds = {
        "DINO global": (RandomCrop(224, (0.4, 1.0)), 2),
        "local": (RandomCrop(96, (0.05, 0.4)), 8),
        "PCD": (RandomCrop(224, (0.08, 1.0), filter="bilinear"), 2),
    }
    boxes = {
        name: crop.place(source_sizes(full), torch.rand(views, len(full), DRAWS_PER_CROP, generator=generator))
        for name, (crop, views) in kinds.items()
    }
    expected: dict[str, float] = {}
    for way, (prepare, bytes_of) in _ways().items():
        row = []
        for name, (crop, _) in kinds.items():
            values = []
            for i, content in enumerate(contents):
                image = prepare(content)
                size = torch.tensor([full[i].shape[1:]], dtype=torch.float32)
                place = CropBoxes(*(each[:, i : i + 1] for each in boxes[name]))
                stretched = scale_boxes(place.boxes_xyxy, size, image.shape[1:])
                cut = cut_crops([image], size, CropBoxes(stretched, place.flip), crop.size, crop.filter)
                values.append(sharpness(cut.flatten(0, 1))[0])
            mean = torch.cat(values).mean().item()
            expected.setdefault(name, mean)
            row.append(mean / expected[name])
        start = time.process_time()
        for i, content in enumerate(contents):
            image = prepare(content)
            if bytes_of is None:  # crops are cut in the loader process too
                for name in ("DINO global", "local"):
                    size = torch.tensor([full[i].shape[1:]], dtype=torch.float32)
                    place = CropBoxes(*(each[:, i : i + 1] for each in boxes[name]))
                    stretched = scale_boxes(place.boxes_xyxy, size, image.shape[1:])
                    cut_crops([image], size, CropBoxes(stretched, place.flip), kinds[name][0].size)
        milliseconds = 1000 * (time.process_time() - start) / len(contents)
        num_bytes = 3 * (2 * 224**2 + 8 * 96**2) if bytes_of is None else bytes_of
        numbers = "".join(f"{value:{width}.3f}" for value, width in zip(row, (12, 8, 8), strict=True))
        print(f"{way:34}{numbers}{num_bytes / 1000:8.0f}{milliseconds:8.1f}", flush=True)


def _ways() -> dict[str, tuple[Callable[[bytes], Tensor], int | None]]:
    """What is cut from, and how many bytes leave the loader process: None for the crops of DINO."""

    def whole(content: bytes) -> Tensor:
        return decode(content, "photograph")

    def square(side: int) -> Callable[[bytes], Tensor]:
        def squash(content: bytes) -> Tensor:
            image, flip = whole(content), torch.zeros(1, 1, dtype=torch.bool)
            size = source_sizes([image])
            return cut_crops([image], size, whole_image(size, flip), side)[0, 0]

        return squash

    def canvas(longer: int) -> Callable[[bytes], Tensor]:
        def shrink(content: bytes) -> Tensor:
            image = whole(content)
            factor = min(1.0, longer / max(image.shape[1:]))
            size = [round(side * factor) for side in image.shape[1:]]
            return torch.nn.functional.interpolate(image[None], size, mode="bicubic", antialias=True)[0]

        return shrink

    def scaled(shorter: int) -> Callable[[bytes], Tensor]:
        def decode_scaled(content: bytes) -> Tensor:
            with Image.open(io.BytesIO(content)) as image:
                factor = shorter / min(image.size)
                image.draft("RGB", (round(image.size[0] * factor), round(image.size[1] * factor)))
                return torch.from_numpy(np.array(ImageOps.exif_transpose(image))).permute(2, 0, 1)

        return decode_scaled

    return {
        "crops in loader processes": (whole, None),
        "same, JPEG scaled to 750 or more": (scaled(750), None),
        "square of 256 (0.1.0)": (square(256), 3 * 256**2),
        "square of 512": (square(512), 3 * 512**2),
        "square of 1024": (square(1024), 3 * 1024**2),
        "canvas, longer side 1024": (canvas(1024), 3 * 1024**2),
    }


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photographs", type=int, default=100)
    parser.add_argument("--draws", type=int, default=4, help="times that every photograph is cut")
    options = parser.parse_args()
    torch.set_num_threads(1)
    contents = photographs(options.folder, options.photographs)
    recipes(contents, options.draws)
    ways(contents)


if __name__ == "__main__":
    main()
