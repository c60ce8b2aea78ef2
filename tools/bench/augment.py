"""CPU time per image of our multi-crop against torchvision v2, a kornia chain and lightly's DINOTransform.

Run: python tools/bench/augment.py [--quick] [--rounds 9]        optional: pip install lightly
Protocol: DINO's recipe on images that are decoded already, as bytes (lightly: as PIL images), to normalised views;
squares are cut by ours on the device, other images one by one, as loader processes do.
torchvision and lightly work image by image, ours and kornia on the batch; kornia crops in its faster mode.
One thread, one process, sides alternate, medians over the rounds, one round before them is left out. As after a
training step, the allocator keeps freed memory (31 MiB are freed once); ours gains most by it, up to 1.3x at 32 px.
kornia does not antialias its crops; its jitter draws one order per batch.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from measure import paired_times, ratio
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from ssl_distill.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD, MultiCropAugment
from ssl_distill.data.batch import ImageBatch, Images, source_sizes
from ssl_distill.draws import Draws


@dataclass(frozen=True)
class Case:
    """Sizes in pixels, and how kornia crops fastest there. What is not square comes one by one, as from files."""

    decoded: tuple[int, int]
    global_size: int
    local_size: int
    num_local: int
    batch: int
    kornia_crop: str


CASES = (
    Case((32, 32), 32, 16, 6, 128, "resample"),
    Case((256, 256), 224, 96, 8, 16, "slice"),
    Case((375, 500), 224, 96, 8, 16, "slice"),
)
GLOBAL_SCALE, LOCAL_SCALE = (0.4, 1.0), (0.05, 0.4)
RECIPES = ((GLOBAL_SCALE, 1.0, 0.0), (GLOBAL_SCALE, 0.1, 0.2), (LOCAL_SCALE, 0.5, 0.0))  # scale, blur, solarise
REACH = {32: {"torchvision v2": 8, "kornia": 3}, 256: {"torchvision v2": 2, "kornia": 2}, 375: {}}


def images_of(case: Case) -> Tensor:
    """Smooth random images: no operator is faster on them than on photographs."""
    noise = torch.rand(case.batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(noise, size=case.decoded, mode="bicubic")
    return (smooth.clamp(0, 1) * 255).byte()


def ours(case: Case) -> Callable[[], object]:
    """The module that training runs."""
    augment = MultiCropAugment(case.global_size, case.local_size, case.num_local)
    stack = images_of(case)
    images: Images = stack
    if case.decoded[0] != case.decoded[1]:
        images = list(stack.contiguous(memory_format=torch.channels_last))  # as decoders give them
    batch = ImageBatch(images, source_sizes(images), torch.arange(case.batch))
    epochs = iter(range(1_000_000))
    return lambda: augment(batch, Draws(0, next(epochs)))


def torchvision_v2(case: Case) -> Callable[[], object]:
    """Per image, on bytes up to the last step."""

    def transform(size: int, scale: tuple[float, float], blur: float, solarize: float) -> v2.Transform:
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=blur),
                v2.RandomSolarize(128, p=solarize),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    views, images = views_of(case, transform), images_of(case)
    return lambda: [[view(image) for view in views] for image in images]


def kornia_chain(case: Case) -> Callable[[], object]:
    """One chain per view on the whole batch."""

    def transform(size: int, scale: tuple[float, float], blur: float, solarize: float) -> nn.Module:
        return nn.Sequential(
            K.RandomResizedCrop(
                (size, size), scale, resample="bicubic", align_corners=False, cropping_mode=case.kornia_crop
            ),
            K.RandomHorizontalFlip(),
            K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.RandomGaussianBlur((13, 13), (0.1, 2.0), "replicate", p=blur),
            *([K.RandomSolarize((128 / 255, 128 / 255), (0.0, 0.0), p=solarize)] if solarize else []),
            K.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        )

    views, images = views_of(case, transform), images_of(case)
    return lambda: [view(floats) for floats in [images.float() / 255] for view in views]


def lightly_transform(case: Case) -> Callable[[], object]:
    """Per image, on PIL images, as lightly's examples do."""
    from lightly.transforms.dino_transform import DINOTransform

    transform = DINOTransform(
        global_crop_size=case.global_size,
        global_crop_scale=GLOBAL_SCALE,
        local_crop_size=case.local_size,
        local_crop_scale=LOCAL_SCALE,
        n_local_views=case.num_local,
    )
    images = [to_pil_image(image) for image in images_of(case)]
    return lambda: [transform(image) for image in images]


def views_of(case: Case, transform: Callable) -> list[Callable]:
    """One transform per view."""
    sizes = (case.global_size, case.global_size, case.local_size)
    first, second, local = (transform(size, *recipe) for size, recipe in zip(sizes, RECIPES, strict=True))
    return [first, second, *[local] * case.num_local]


SIDES = {"ours": ours, "torchvision v2": torchvision_v2, "kornia": kornia_chain, "lightly": lightly_transform}


def main() -> None:
    """Print one table per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.zeros(31 << 18)
    rounds = 3 if arguments.quick else arguments.rounds
    names = [name for name in SIDES if name != "lightly" or importlib.util.find_spec("lightly")]

    for case in CASES:
        times = paired_times({name: SIDES[name](case) for name in names}, rounds)
        print(
            f"\n{case.decoded[0]} x {case.decoded[1]} px to 2x{case.global_size} + {case.num_local}x{case.local_size}, "
            f"batch {case.batch}, n = {rounds}, CPU ms per image"
        )
        print(f"{'':16}{'median':>9}{'min':>9}{'max':>9}{'ours is faster by':>20}{'to reach':>10}")
        for name, seconds in times.items():
            per_image = [1000 * s / case.batch for s in seconds]
            print(
                f"{name:16}{statistics.median(per_image):9.3f}{min(per_image):9.3f}{max(per_image):9.3f}"
                f"{ratio(seconds, times['ours']):19.2f}x{REACH[case.decoded[0]].get(name, ''):>10}"
            )
    if "lightly" not in names:
        print("\nlightly: not installed")


if __name__ == "__main__":
    main()
