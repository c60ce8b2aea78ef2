import pytest
import torch

from ssl_distill.data.batch import LabelledBatch
from ssl_distill.draws import Draws
from ssl_distill.evaluate.probe_crop import ProbeCrop


def ramps(num, size=32):
    """Red grows from left to right, green from top to bottom: colours tell where a crop lies."""
    ramp = torch.linspace(0, 255, size)
    image = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size), torch.zeros(size, size)])
    return LabelledBatch(image.to(torch.uint8).expand(num, -1, -1, -1), torch.zeros(num).long(), torch.arange(num))


def test_crops_have_the_law_of_torchvision():
    crops = ProbeCrop(16, mean=(0, 0, 0), std=(1, 1, 1))(ramps(2000), Draws(0, 0)).image
    assert crops.shape == (2000, 3, 16, 16)
    width = crops[:, 0, 8, -1] - crops[:, 0, 8, 0]
    height = crops[:, 1, -1, 8] - crops[:, 1, 0, 8]
    assert (width < 0).float().mean() == pytest.approx(0.5, abs=0.05)  # mirrored
    assert (height > 0).all()
    area = width.abs() * height * (16 / 15) ** 2  # between pixel centers
    assert 0.05 < area.min() < 0.12
    assert 0.85 < area.max() < 1.1
    assert area.mean() == pytest.approx(0.5, abs=0.06)


def test_replay_and_normalisation():
    crop = ProbeCrop(8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    first = crop(ramps(4), Draws(1, 0)).image
    assert torch.equal(crop(ramps(4), Draws(1, 0)).image, first)
    assert not torch.equal(crop(ramps(4), Draws(1, 1)).image, first)
    assert not torch.equal(first[0], first[1])
    torch.testing.assert_close(first[:, 2], torch.full((4, 8, 8), -1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "`size` must be at least 1 pixel, got 0"),
        ({"scale": (0.5, 1.5)}, r"`scale` must be .*, got \(0.5, 1.5\)"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProbeCrop(**arguments)
