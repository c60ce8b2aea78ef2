"""What the network sees, as a picture."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from lightning.fabric.utilities import move_data_to_device
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from ssl_distill.callbacks.atomic import replacing
from ssl_distill.data.module import TrainingSet, in_loader
from ssl_distill.draws import Draws, run_seed

_GAP = 4  # pixels between cells
_LARGEST = 192  # pixels of a cell
_HEADER = 16  # pixels for the names of the columns


def sample_batch(loader: DataLoader, count: int) -> Any:
    """A batch of `count` whole images spread over the data set, read without the loader's workers and sampler."""
    dataset: Any = loader.dataset
    dataset = dataset.images if isinstance(dataset, TrainingSet) else dataset
    if not hasattr(dataset, "__len__"):
        return next(iter(loader))
    count = min(count, len(dataset))
    indices = [i * len(dataset) // count for i in range(count)]
    items = dataset.__getitems__(indices) if hasattr(dataset, "__getitems__") else [dataset[i] for i in indices]
    assert loader.collate_fn is not None
    return loader.collate_fn(items)


def draw_views(batch: Any, augment: Any, path: str | Path, device: torch.device | str = "cpu") -> None:
    """Save a picture with one row per image: the source, then every view that `augment` makes of it in epoch 0.

    Args:
        batch: Images as bytes, `image`, with their `source_size` (B, 2).
        augment: (batch, draws) to a named tuple of normalised views; has `mean` and `std`. Pictures are its fields of
            shape (B, 3, H, W) and (V, B, 3, H, W). Of its masks of patches (V, B, N), True is shown as it is in the
            first pictures, and False grey. Other fields are left out.
        path: Image file to write.
        device: Where views are finished.
    """
    columns = [("source", list(_sources(batch)))]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (augment.mean, augment.std))
    crops: Tensor | None = None
    draws = Draws(run_seed(), epoch=0)
    if not isinstance(batch.image, Tensor):
        batch = in_loader(augment, _LARGEST)(batch, draws)
    for name, stack in augment(move_data_to_device(batch, torch.device(device)), draws)._asdict().items():
        if not isinstance(stack, Tensor):
            continue
        if stack.is_floating_point() and stack.ndim in (4, 5) and stack.shape[-3] == 3:
            pictures = (stack if stack.ndim == 5 else stack[None]).float().cpu() * std + mean
            crops = pictures if crops is None else crops
        elif stack.dtype == torch.bool and stack.ndim == 3 and crops is not None:
            pictures = _only(crops, stack.cpu())
        else:
            continue
        columns += [(f"{name.removesuffix('s')} {i + 1}", list(view)) for i, view in enumerate(pictures)]
    with replacing(path) as temporary:
        picture_table(columns).save(temporary)


def _only(crops: Float[Tensor, "V B 3 H W"], shown: Bool[Tensor, "V B N"]) -> Float[Tensor, "V B 3 H W"]:
    """Crops of which only some patches, of a square grid, are seen as they are."""
    side = math.isqrt(shown.shape[2])
    clear = interpolate(shown.float().unflatten(2, (side, side)), crops.shape[-2:])[:, :, None]
    return torch.lerp(torch.full_like(crops, 0.5), crops, 0.2 + 0.8 * clear)


def _sources(batch: Any) -> Iterator[Float[Tensor, "3 _ _"]]:
    """Source images in [0, 1], none larger than is shown, their squashing to a square undone."""
    for image, (height, width) in zip(batch.image, batch.source_size.tolist(), strict=True):
        scale = min(max(image.shape[-2:]), _LARGEST) / max(height, width)
        size = (max(round(height * scale), 1), max(round(width * scale), 1))
        yield interpolate(image[None].float() / 255, size, mode="bilinear", antialias=True)[0]


def picture_table(columns: Sequence[tuple[str, list[Float[Tensor, "3 _ _"]]]]) -> Image.Image:
    """Named columns of images in [0, 1]. A source fills its cell; crops keep their sizes relative to each other."""
    largest = max(max(image.shape[-2:]) for _, images in columns[1:] for image in images)
    cell = min(max(largest, 96), _LARGEST)
    rows = len(columns[0][1])
    canvas = Image.new("RGB", (len(columns) * (cell + _GAP), _HEADER + rows * (cell + _GAP)), "white")
    pen = ImageDraw.Draw(canvas)
    for x, (name, images) in enumerate(columns):
        pen.text((x * (cell + _GAP), 2), name, fill="black")
        for y, image in enumerate(images):
            height, width = image.shape[-2:]
            zoom = cell / (largest if x else max(height, width))
            pixels = Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
            pixels = pixels.resize(
                (max(round(width * zoom), 1), max(round(height * zoom), 1)), Image.Resampling.BILINEAR
            )
            canvas.paste(pixels, (x * (cell + _GAP), _HEADER + y * (cell + _GAP)))
    return canvas
