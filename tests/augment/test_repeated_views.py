import pytest
import torch

from ssl_distill.augment.repeated_views import RepeatedViews
from ssl_distill.augment.two_view import TwoViewAugment
from ssl_distill.data.batch import ImageBatch
from ssl_distill.draws import Draws


def batch():
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageBatch(pixels, torch.full((3, 2), 32.0), torch.tensor([4, 0, 9]))


def test_views_come_again():
    augment = TwoViewAugment(16)
    repeated = RepeatedViews(augment, num_epochs=2)
    epochs = [repeated(batch(), Draws(0, epoch)) for epoch in range(4)]
    for found, again in ((epochs[0], epochs[2]), (epochs[1], epochs[3]), (epochs[1], augment(batch(), Draws(0, 1)))):
        torch.testing.assert_close(found, again, rtol=0, atol=0)
    assert not torch.equal(epochs[0].images, epochs[1].images)
    assert epochs[3].origin.tolist() == [[0, 1, 4], [0, 1, 0], [0, 1, 9]]


def test_knows_what_its_part_knows():
    augment = TwoViewAugment(16, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    repeated = RepeatedViews(augment)
    assert (repeated.global_size, repeated.mean, repeated.std) == (16, augment.mean, augment.std)


def test_errors():
    with pytest.raises(ValueError, match="`num_epochs` must be at least 1, got 0"):
        RepeatedViews(TwoViewAugment(16), 0)
