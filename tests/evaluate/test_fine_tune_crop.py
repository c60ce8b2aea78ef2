import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import nn

from ssl_distill.data.batch import LabelledBatch, LabelledImages
from ssl_distill.data.image_folder import ImageFolderData
from ssl_distill.data.labelled import LabelledData
from ssl_distill.draws import Draws
from ssl_distill.evaluate.fine_tune_crop import FineTuneCrop, _seeded
from ssl_distill.evaluate.probe_crop import ProbeCrop

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def photographs(num, sizes=((60, 80), (72, 50))):
    generator = torch.Generator().manual_seed(0)
    small = [torch.rand(1, 3, 6, 6, generator=generator) for _ in range(num)]
    images = [nn.functional.interpolate(each, sizes[i % 2], mode="bicubic") for i, each in enumerate(small)]
    pixels = [(each[0].clamp(0, 1) * 255).to(torch.uint8) for each in images]
    return LabelledImages(pixels, torch.arange(num), torch.arange(num))


def part_of(batch, positions):
    return LabelledImages([batch.image[i] for i in positions], batch.label[positions], batch.index[positions])


def test_rand_augment_is_timms_on_the_crop():
    """The same operations with the same settings as in timm's own training transform, after crop and flip."""
    batch, draws = photographs(200), Draws(3, 1)
    crop = ProbeCrop(32, filter="bicubic")
    changed = FineTuneCrop(crop, erasing_probability=0.0).cut(batch, draws)
    crops = crop.cut(batch, draws).image
    assert changed.image.dtype == torch.uint8
    share = (changed.image != crops).flatten(1).any(1).float().mean()
    # Both operations are left out a quarter of the time; some change nothing.
    assert 0.55 < share < 0.8
    settings = {"translate_const": 14, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", dict(settings))
    random.seed(0)
    np.random.seed(0)
    expected = [np.asarray(theirs(Image.fromarray(each.permute(1, 2, 0).numpy()))) for each in crops]
    distance = np.abs(np.stack(expected).astype(float) - crops.permute(0, 2, 3, 1).numpy()).mean((1, 2, 3))
    ours = (changed.image.float() - crops.float()).abs().mean((1, 2, 3)).numpy()
    assert np.mean(ours) == pytest.approx(np.mean(distance), rel=0.2)
    assert np.mean(ours > 40) == pytest.approx(np.mean(distance > 40), abs=0.1)


def test_draws_follow_seed_epoch_and_index():
    """Whatever else is in the batch, and without a trace in the global generators."""
    batch, view = photographs(6), FineTuneCrop(ProbeCrop(32, **PLAIN), erasing_probability=0.5)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    whole = view(batch, Draws(0, 0)).image
    assert (np.random.get_state()[1] == states[0]).all()
    assert torch.equal(torch.get_rng_state(), states[1])
    random.seed(1)
    torch.manual_seed(1)
    positions = [4, 1]
    assert torch.equal(view(part_of(batch, positions), Draws(0, 0)).image, whole[positions])
    for other in (Draws(0, 1), Draws(1, 0)):
        assert not torch.equal(view(batch, other).image, whole)


def test_seeded_leaves_pythons_generator_as_it_was():
    before = random.getstate()  # of its own: the shape checks of the whole suite draw from it too
    with _seeded(3):
        first = random.random()
    assert random.getstate() == before
    with _seeded(3):
        assert random.random() == first


def test_largest_magnitude_of_every_operation():
    """Pillow refuses what timm's law gives in 2 % of its draws."""
    batch = photographs(150)
    changed = FineTuneCrop(ProbeCrop(16), policy="rand-m10-p1-inc1").cut(batch, Draws(0, 0)).image
    assert (changed.flatten(1) == 0).all(1).any()  # posterised to no bits


def test_erasing_has_timms_law():
    """A quarter of the images lose 2 to 33 % of their area to noise of normalised pixels."""
    grey = torch.full((1, 3, 40, 40), 128, dtype=torch.uint8)
    batch = LabelledBatch(grey.expand(400, -1, -1, -1), torch.zeros(400).long(), torch.arange(400))
    view = FineTuneCrop(ProbeCrop(32), policy="rand-m0-p0-inc1")  # no operation is applied
    images = view(batch, Draws(0, 0)).image
    kept = ProbeCrop(32)(batch, Draws(0, 0)).image
    noisy = ((images - kept).abs() > 0.01).any(1).flatten(1).float().mean(1)
    assert (noisy > 0).float().mean() == pytest.approx(0.25, abs=0.06)
    erased = noisy[noisy > 0]
    assert 0.015 < erased.min() < 0.08
    assert 0.25 < erased.max() < 0.36
    noise = images[(images - kept).abs() > 0.01]
    assert noise.mean().item() == pytest.approx(0, abs=0.05)
    assert noise.std().item() == pytest.approx(1, abs=0.05)


def test_loader_processes_augment_whole_pictures(tmp_path):
    """Bytes arrive as this process would have made them, and become what fine-tuning eats."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    for number, pixels in enumerate(photographs(6).image):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / ("cat", "dog")[number % 2] / f"{number}.png")
    images = ImageFolderData(
        str(tmp_path), labels="folder", val_root=str(tmp_path), num_workers=1, eval_size=16, seed=0, bank_size=6
    )
    images.augment = view = FineTuneCrop(ProbeCrop(16))
    data = LabelledData(images, batch_size=2)
    data.setup("fit")
    for batch in data.train_dataloader():
        assert batch.views.image.dtype == torch.uint8
        whole = images.parts.labelled.read(batch.index.tolist())
        assert torch.equal(view.cut(whole, Draws(0, 0)).image, batch.views.image)
        assert view(batch, Draws(0, 0)).image.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "rand-q3"}, "`policy` must be RandAugment in timm's notation, .* got 'rand-q3'"),
        ({"policy": "augmix-m3"}, "`policy` must be RandAugment in timm's notation, .* got 'augmix-m3'"),
        ({"erasing_probability": 1.5}, r"`erasing_probability` must .* got 1.5"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        FineTuneCrop(**arguments)
