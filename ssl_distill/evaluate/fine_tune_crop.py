"""The training view of fine-tuning: a crop, RandAugment, random erasing."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from ssl_distill.augment.base import ViewAugment
from ssl_distill.augment.checks import check_probability
from ssl_distill.data.batch import LabelledBatch, LabelledImages
from ssl_distill.draws import Draws
from ssl_distill.evaluate.probe_crop import ProbeCrop

_POLICY, _ERASING = 1, 2  # streams of draws; that of the crop is 0


class FineTuneCrop(ViewAugment[LabelledBatch]):
    """A random crop changed by timm's RandAugment, normalised, of which timm's random erasing takes a rectangle.

    RandAugment works on bytes, as PIL does: in loader processes where the images are whole there. Both are functions of
    (seed, epoch, index), and leave the global generators as they were.

    Args:
        crop: None is `ProbeCrop` with a bicubic filter.
        policy: RandAugment in timm's notation; the default is two operations of magnitude 9 with a deviation of 0.5,
            each applied half of the time.
        erasing_probability: Share of images of which a rectangle is replaced by normally distributed pixels.

    Raises:
        ValueError: If the policy is none of timm's, or the probability none.

    Source: dBOT (arXiv 2209.03917), appendix: BEiT's recipe, timm's augmentations with timm's defaults.
    """

    def __init__(
        self,
        crop: ProbeCrop | None = None,
        policy: str = "rand-m9-mstd0.5-inc1",
        erasing_probability: float = 0.25,
    ) -> None:
        super().__init__()
        check_probability("erasing_probability", erasing_probability)
        self.crop = crop or ProbeCrop(filter="bicubic")
        self.mean, self.std = self.crop.mean, self.crop.std
        hparams = {
            "translate_const": int(self.crop.crop.size * 0.45),
            "img_mean": tuple(round(255 * channel) for channel in self.mean),
            "interpolation": Image.Resampling.BICUBIC,
        }
        try:
            self.rand_augment = rand_augment_transform(policy, hparams)
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(
                f"`policy` must be RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1, got {policy!r}."
            ) from error
        for operation in self.rand_augment.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
        self.erasing = RandomErasing(erasing_probability, mode="pixel")

    def cut(self, batch: LabelledBatch | LabelledImages, draws: Draws) -> LabelledBatch:
        """Crops in changed colours and shapes, as bytes."""
        crops = self.crop.cut(batch, draws)
        pixels = crops.image
        if pixels.is_floating_point():
            pixels = (pixels * 255).round_().to(torch.uint8)
        for image, seed in zip(pixels, _seeds(draws, crops.index, _POLICY), strict=True):
            with _seeded(seed):
                image.copy_(_through_pil(self.rand_augment, image))
        return crops._replace(image=pixels)

    def finish(self, views: LabelledBatch, index: Int[Tensor, "B"], draws: Draws) -> LabelledBatch:
        """Normalised crops, some with a rectangle of noise."""
        finished = self.crop.finish(views, index, draws)
        self.erasing.device = device = finished.image.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for image, seed in zip(finished.image, _seeds(draws, index, _ERASING), strict=True):
                with _seeded(seed):
                    torch.manual_seed(seed)
                    self.erasing(image)
        return finished


def _seeds(draws: Draws, index: Int[Tensor, "B"], stream: int) -> list[int]:
    """32 bits for every image."""
    high, low = draws.uniform(index, stream, 2).double().unbind(1)
    return (high * 2**24).long().mul(2**8).add((low * 2**8).long()).tolist()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's and numpy's generators, which timm draws from, seeded inside and afterwards as they were."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """The largest magnitude of timm's law keeps no bits: black in older versions of Pillow, an error in newer ones."""
    return posterize(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)


def _through_pil(change: Any, image: UInt8[Tensor, "3 H W"]) -> UInt8[Tensor, "3 H W"]:
    changed = change(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()))
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1)
