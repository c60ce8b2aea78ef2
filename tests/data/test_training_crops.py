"""What training sees of images of any sizes: crops of the whole picture, resampled once."""

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_distill.augment.base import CutBatch
from ssl_distill.augment.masked_crop import MaskedCropAugment
from ssl_distill.augment.masked_image import MaskedImageAugment
from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.augment.plain import PlainAugment
from ssl_distill.augment.repeated_views import RepeatedViews
from ssl_distill.augment.two_view import TwoViewAugment
from ssl_distill.data.image_folder import ImageFolderData
from ssl_distill.data.labelled import LabelledData
from ssl_distill.draws import Draws
from ssl_distill.evaluate.probe_crop import ProbeCrop

SIZES = [(400, 300), (640, 480), (375, 500), (1500, 2000)]


def photograph(seed, size):
    """Noise whose amplitude falls with frequency as that of photographs does."""
    noise = np.random.default_rng(seed).standard_normal((3, *size))
    down, across = np.fft.fftfreq(size[0])[:, None], np.fft.fftfreq(size[1])
    amplitude = 1 / np.maximum(np.hypot(down, across), 1 / max(size))
    pixels = np.fft.ifft2(np.fft.fft2(noise) * amplitude).real
    pixels = 127 + 50 * pixels / pixels.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number, size in enumerate(SIZES):
            photograph(number, size).save(folder / name / f"{number}.png")
    return folder


def data_of(folder, augment, **kwargs):
    data = ImageFolderData(str(folder), **{"batch_size": 4, "num_workers": 0, "seed": 0, "eval_size": 32, **kwargs})
    data.augment = augment
    data.setup("fit")
    return data


def sharpness(crops):
    """Mean variance of the second difference, down and across."""
    gray = crops.double().flatten(0, -4).mean(1)
    return torch.stack([gray.diff(n=2, dim=axis).flatten(1).var(1).mean() for axis in (1, 2)])


AUGMENTS = {
    "DINO": (lambda: MultiCropAugment(num_local=2), "global_crops"),
    "DINO, local": (lambda: MultiCropAugment(num_local=2), "local_crops"),
    "iBOT": (MaskedCropAugment, "global_crops"),
    "dBOT": (MaskedImageAugment, "images"),
    "PCD": (TwoViewAugment, "images"),
}


@pytest.mark.parametrize("name", AUGMENTS)
def test_crops_are_as_sharp_as_those_of_pil(name, photographs):
    """From the original files, on both axes: at most 5 % of the sharpness may be lost on the way."""
    make, field = AUGMENTS[name]
    augment = make()
    data = data_of(photographs, augment)
    kind = augment.crops.global_crop if name == "iBOT" else getattr(augment, "crop", None)
    if kind is None:
        kind = augment.local_crop if field == "local_crops" else augment.global_crop
    ours, expected = [], []
    kernel = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[kind.filter]
    placed = []
    place = type(kind).place

    def remembered(self, *args):
        places = place(self, *args)
        if self is kind:
            placed.append(places)
        return places

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(kind), "place", remembered)
        batches = list(data.train_dataloader())
    paths = data.parts.train.read.__self__.source.paths
    for batch, places in zip(batches, placed, strict=True):
        crops = getattr(batch.views, field)
        crops = crops if crops.ndim == 5 else crops[None]
        ours.append(crops)
        for view, boxes in enumerate(places.boxes_xyxy.tolist()):
            for number, box in enumerate(boxes):
                with Image.open(paths[int(batch.index[number])]) as image:
                    cut = image.crop(box).resize((kind.size, kind.size), kernel)
                if places.flip[view, number]:
                    cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                expected.append(torch.from_numpy(np.array(cut)).permute(2, 0, 1))
    ratio = sharpness(torch.cat([each.flatten(0, 1) for each in ours])) / sharpness(torch.stack(expected))
    assert ratio.min() >= 0.95
    assert ratio.max() <= 1.05


@pytest.mark.parametrize(
    "augment",
    [MultiCropAugment(32, 16, 2), RepeatedViews(TwoViewAugment(32)), PlainAugment(24), MaskedImageAugment(32)],
    ids=["crops", "repeated", "plain", "masked"],
)
def test_views_follow_from_seed_epoch_and_index_alone(augment, photographs):
    """Whatever the number of loader processes, and in the second epoch too, which they live to see."""
    views = {}
    for num_workers in (0, 2):
        loader = data_of(photographs, augment, num_workers=num_workers).train_dataloader()
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                assert isinstance(batch, CutBatch)
                made = augment(batch, Draws(0, epoch))
                for row, index in enumerate(batch.index.tolist()):
                    views.setdefault((epoch, index), []).append(made[0].movedim(-4, 0)[row])
    assert len(views) == 16
    for first, second in views.values():
        assert torch.equal(first, second)
    repeats = isinstance(augment, (RepeatedViews, PlainAugment))
    assert torch.equal(views[0, 3][0], views[1, 3][0]) == repeats


def test_probes_draw_from_the_whole_picture(photographs):
    """Not from the central square that evaluation sees: crops reach into all corners of a wide picture."""
    wide = photographs.parent / "wide"
    for name in ("cat", "dog"):
        (wide / name).mkdir(parents=True, exist_ok=True)
        for number in range(4):
            ramp = np.linspace(0, 255, 400).astype(np.uint8)
            Image.fromarray(np.broadcast_to(ramp[:, None], (100, 400, 3)).copy()).save(wide / name / f"{number}.png")
    images = data_of(wide, ProbeCrop(16, mean=(0.0,) * 3, std=(1.0,) * 3))
    data = LabelledData(images, batch_size=4)
    data.setup("fit")
    loader = data.train_dataloader()
    seen = []
    for epoch in range(20):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            crops, labels, index = images.augment(batch, Draws(0, epoch))
            assert torch.equal(labels, images.parts.bank.read(index.tolist()).label)
            seen.append(crops)
    seen = torch.cat(seen)
    assert seen.min() < 0.05  # the central square shows from 0.375 to 0.625
    assert seen.max() > 0.95


def test_an_augmentation_that_cuts_on_the_device_gets_squares(photographs):
    data = data_of(photographs, None, decode_size=48)
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (4, 3, 48, 48)
    assert set(map(tuple, batch.source_size.int().tolist())) <= set(SIZES)
