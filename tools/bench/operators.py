"""Every operator of the augmentations, ours, kornia's and torchvision's: how far from PIL, and CPU time.

Run: python tools/bench/operators.py [--rounds 7] [--write]        --write: put the table into docs/augmentation.md
Protocol: smooth random pictures with noise, one amount per picture. "off PIL" is the largest and the mean difference of
pixels in 1/255 from PIL's operator on bytes, whose own rounding is up to 1 of it, at 224 pixels; differences of places
leave out 8 pixels at the border, where libraries fill differently. Time is CPU ms per picture at 32 px (batch 128) and
224 px (batch 16), one thread, sides alternate, medians; ours and kornia work on the batch of floats, torchvision
picture by picture, as its transforms do. Where ours is a dash, we use kornia's operator; our brightness, contrast and
saturation are steps of the jitter, which makes three of them whatever it is asked for.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import kornia.augmentation as K
import kornia.enhance as enhance
import kornia.geometry.transform as warp
import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d
from measure import paired_times
from PIL import ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pil
from torchvision.transforms.v2 import functional as v2

from ssl_distill.augment.color_ops import blur, jitter, shift_hue
from ssl_distill.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD
from ssl_distill.augment.resample import resample_crops

PAGE = Path(__file__).parents[2] / "docs/augmentation.md"
START, END = "<!-- tools/bench/operators.py writes this -->\n", "<!-- until here -->\n"
BILINEAR, BICUBIC = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC


class Operator(NamedTuple):
    """One operator of three libraries on the same pictures; None where a library has none.

    Attributes:
        reference: A PIL image and its amount to a PIL image; None where PIL has none.
        ours: Floats (B, 3, H, W) and amounts (B,) to floats.
        kornia: The same.
        torchvision: One picture (3, H, W) and its amount to floats.
        amount: Smallest and largest.
        margin: Pixels at the border that are not compared.
    """

    reference: Callable | None
    ours: Callable | None
    kornia: Callable | None
    torchvision: Callable | None
    amount: tuple[float, float] = (0.6, 1.4)
    margin: int = 0


def pictures(count: int, size: int) -> Tensor:
    """Bytes: smooth, with edges and a little noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = F.interpolate(coarse, size=size, mode="bicubic") + 0.05 * torch.randn(
        count, 3, size, size, generator=generator
    )
    smooth[:, :, size // 3 : size // 2, size // 4 :] = coarse[:, :, :1, :1]
    return (smooth.clamp(0, 1) * 255).byte()


def jittered(step: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Our jitter with nothing but one sub-step."""
    place = ("brightness", "contrast", "saturation").index(step)

    def change(images: Tensor, amount: Tensor) -> Tensor:
        factors = torch.ones(len(images), 3)
        factors[:, place] = amount
        images = images.clone()
        jitter(images, factors, torch.zeros(len(images)), torch.zeros(len(images), dtype=torch.long))
        return images

    return change


def whole_jitter(images: Tensor, amount: Tensor) -> Tensor:
    """All four sub-steps, an order per picture."""
    images = images.clone()
    jitter(images, amount[:, None].expand(-1, 3), (amount - 1) / 4, torch.arange(len(images)) % 24)
    return images


def cropped(images: Tensor) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop."""
    size = images.shape[-1]
    return size // 8, size // 16, size * 3 // 4, size * 5 // 8


def our_crop(images: Tensor, amount: Tensor) -> Tensor:
    """Cut and resized to the pictures' own size."""
    top, left, height, width = cropped(images)
    boxes = torch.tensor([[left, top, left + width, top + height]]).float().expand(len(images), 4)
    numbers = torch.arange(len(images))
    return resample_crops((images * 255).byte(), numbers, boxes, numbers < 0, images.shape[-1])


def kornia_crop(images: Tensor, amount: Tensor) -> Tensor:
    """The same by kornia's warp, as its RandomResizedCrop does by default."""
    top, left, height, width = cropped(images)
    corners = [[left, top], [left + width - 1, top], [left + width - 1, top + height - 1], [left, top + height - 1]]
    boxes = torch.tensor([corners]).float().expand(len(images), 4, 2)
    return warp.crop_and_resize(images, boxes, (images.shape[-2], images.shape[-1]), mode="bicubic").clamp(0, 1)


def torchvision_crop(image: Tensor, amount: float) -> Tensor:
    """The same by torchvision."""
    return v2.resized_crop(image, *cropped(image), list(image.shape[-2:]), BICUBIC, antialias=True).clamp(0, 1)


def corners_of(size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Where the corners of a picture come from and go to in perspective."""
    last, inset = size - 1, size // 8
    start = [[0, 0], [last, 0], [last, last], [0, last]]
    return start, [[inset, inset // 2], [last - inset // 2, inset], [last, last - inset], [inset // 2, last]]


def kornia_perspective(images: Tensor, amount: Tensor) -> Tensor:
    """By the matrix of four corners, which PIL counts from the edges of pixels and kornia from their middles."""
    start, end = (torch.tensor([points]) - 0.5 for points in corners_of(images.shape[-1]))
    matrix = warp.get_perspective_transform(start, end).expand(len(images), 3, 3)
    return warp.warp_perspective(images, matrix, (images.shape[-2], images.shape[-1]), align_corners=True)


MEAN, STD = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
OPERATORS = {
    "brightness": Operator(
        pil.adjust_brightness, jittered("brightness"), enhance.adjust_brightness_accumulative, v2.adjust_brightness
    ),
    "contrast": Operator(
        pil.adjust_contrast, jittered("contrast"), enhance.adjust_contrast_with_mean_subtraction, v2.adjust_contrast
    ),
    "saturation": Operator(
        pil.adjust_saturation,
        jittered("saturation"),
        enhance.adjust_saturation_with_gray_subtraction,
        v2.adjust_saturation,
    ),
    "hue": Operator(
        pil.adjust_hue,
        shift_hue,
        lambda images, turn: enhance.adjust_hue(images, turn * 2 * math.pi),
        v2.adjust_hue,
        (-0.1, 0.1),
    ),
    "jitter, all four": Operator(
        None,
        whole_jitter,
        lambda images, amount: K.ColorJitter(0.4, 0.4, 0.4, 0.1)(images),
        lambda image, amount: v2.adjust_hue(
            v2.adjust_saturation(v2.adjust_contrast(v2.adjust_brightness(image, amount), amount), amount),
            (amount - 1) / 4,
        ),
    ),
    "greyscale": Operator(
        lambda image, _: pil.to_grayscale(image, 3),
        None,
        lambda images, _: rgb_to_grayscale(images).expand_as(images),
        lambda image, _: v2.rgb_to_grayscale(image, 3),
    ),
    "Gaussian blur": Operator(
        lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)),
        lambda images, sigma: blur(images, sigma, 2.0),
        lambda images, sigma: gaussian_blur2d(images, 13, sigma[:, None].expand(-1, 2), "replicate"),
        lambda image, sigma: v2.gaussian_blur(image, [13, 13], [sigma, sigma]),
        (0.1, 2.0),
        margin=8,
    ),
    "solarise": Operator(
        lambda image, _: pil.solarize(image, 128),
        None,
        lambda images, _: enhance.solarize(images, 128 / 255),
        lambda image, _: v2.solarize(image, 128 / 255),
    ),
    "normalise": Operator(
        None,
        None,
        lambda images, _: enhance.normalize(images, MEAN, STD),
        lambda image, _: v2.normalize(image, list(IMAGENET_MEAN), list(IMAGENET_STD)),
    ),
    "crop and resize": Operator(
        lambda image, _: pil.resized_crop(image, *cropped(pil.pil_to_tensor(image)), [image.height] * 2, BICUBIC),
        our_crop,
        kornia_crop,
        torchvision_crop,
    ),
    "flip": Operator(
        lambda image, _: pil.hflip(image), None, lambda images, _: warp.hflip(images), lambda image, _: v2.hflip(image)
    ),
    "rotation": Operator(
        lambda image, angle: pil.rotate(image, angle, BILINEAR),
        None,
        lambda images, angle: warp.rotate(images, angle, align_corners=True),
        lambda image, angle: v2.rotate(image, angle, BILINEAR),
        (-30.0, 30.0),
        margin=60,
    ),
    "perspective": Operator(
        lambda image, _: pil.perspective(image, *corners_of(image.width), BILINEAR),
        None,
        kornia_perspective,
        lambda image, _: v2.perspective(image, *corners_of(image.shape[-1]), BILINEAR),
        margin=40,
    ),
}


def sides(operator: Operator, count: int, size: int) -> dict[str, Callable[[], Tensor]]:
    """The libraries on the same pictures."""
    images = pictures(count, size).float() / 255
    amount = torch.linspace(*operator.amount, count)
    found: dict[str, Callable[[], Tensor]] = {}
    for name, work in (("ours", operator.ours), ("kornia", operator.kornia)):
        if work is not None:
            found[name] = partial(work, images, amount)
    single = operator.torchvision
    if single is not None:
        pairs = list(zip(images, amount.tolist(), strict=True))
        found["torchvision"] = lambda: torch.stack([single(*pair) for pair in pairs])
    return found


def off_pil(operator: Operator, count: int = 8, size: int = 224) -> dict[str, str]:
    """Largest and mean difference of every library from PIL, in 1/255."""
    if operator.reference is None:
        return {}
    amounts = torch.linspace(*operator.amount, count).tolist()
    originals = [pil.to_pil_image(image) for image in pictures(count, size)]
    expected = torch.stack(
        [pil.pil_to_tensor(operator.reference(*each)) for each in zip(originals, amounts, strict=True)]
    )
    inner = slice(operator.margin, size - operator.margin)
    found = {}
    for name, work in sides(operator, count, size).items():
        difference = (work() * 255 - expected)[..., inner, inner].abs()
        found[name] = f"{difference.max():.1f}, {difference.mean():.2f}"
    return found


def table(rounds: int) -> Iterator[str]:
    """The rows in Markdown."""
    names = ("ours", "kornia", "torchvision")
    yield "| operator | " + " | ".join(f"{name}: off PIL | {name}: ms at 32, 224 px" for name in names) + " |"
    yield "|---" * 7 + "|"
    for title, operator in OPERATORS.items():
        difference, times = off_pil(operator), []
        for count, size in ((128, 32), (16, 224)):
            measured = paired_times(sides(operator, count, size), rounds)
            times.append({name: 1000 * statistics.median(each) / count for name, each in measured.items()})
        cells = [
            f"{difference.get(name, '-')} | "
            + (", ".join(f"{each[name]:.3f}" for each in times) if name in times[0] else "-")
            for name in names
        ]
        yield f"| {title} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.zeros(31 << 18)  # as after a training step, the allocator keeps freed memory
    rows = "".join(f"{row}\n" for row in table(arguments.rounds))
    print(rows)
    if arguments.write:
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(before + START + "\n" + rows + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
