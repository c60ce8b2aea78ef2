import pytest
import torch

from ssl_distill.augment.plain import NoiseAugment, PlainAugment
from ssl_distill.data.batch import ImageBatch
from ssl_distill.draws import Draws


def batch(count=4, size=8):
    image = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageBatch(image, torch.full((count, 2), float(size)), torch.arange(count))


def test_a_view_is_the_image():
    augment = PlainAugment(8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    views = augment(batch(), Draws(0, 0))
    assert views.global_crops.shape == (1, 4, 3, 8, 8)
    assert views.local_crops.shape == (0, 4, 3, 8, 8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (augment.mean, augment.std))
    torch.testing.assert_close(views.global_crops[0] * std + mean, batch().image / 255)
    assert torch.equal(views.global_crops, augment(batch(), Draws(1, 5)).global_crops)


def test_other_sizes_are_resized():
    views = PlainAugment(4, mean=(0.0,) * 3, std=(1.0,) * 3)(batch(), Draws(0, 0))
    assert views.global_crops.shape == (1, 4, 3, 4, 4)
    torch.testing.assert_close(views.global_crops.mean(), (batch().image / 255).mean(), rtol=0.02, atol=0)


def test_noise_belongs_to_an_image():
    augment = NoiseAugment(16)
    noise = augment(batch(64), Draws(0, 0)).global_crops
    assert noise.shape == (1, 64, 3, 16, 16)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs((noise**4).mean() - 3) < 0.15
    assert torch.equal(noise, augment(batch(64), Draws(0, 7)).global_crops)  # the same in every epoch
    assert not torch.equal(noise, augment(batch(64), Draws(1, 0)).global_crops)
    flat = noise[0].flatten(1)
    assert torch.corrcoef(flat)[~torch.eye(64, dtype=torch.bool)].abs().max() < 0.2


def test_errors():
    for call, message in [
        (lambda: PlainAugment(0), "`global_size` must be at least 1 pixel, got 0"),
        (lambda: NoiseAugment(8, std=(1.0, 0.0, 1.0)), "`std` must be positive in every channel"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
