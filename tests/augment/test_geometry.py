import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from ssl_distill.augment.geometry import DRAWS_PER_CROP, sample_crops, scale_boxes
from ssl_distill.draws import Draws

RATIO = (3 / 4, 4 / 3)


def crops(count, size, scale=(0.4, 1.0), ratio=RATIO, flip_probability=0.5, seed=0):
    uniform = Draws(seed, 0).uniform(torch.arange(count), 0, DRAWS_PER_CROP)
    return sample_crops(torch.tensor([size]).float().expand(count, 2), uniform, scale, ratio, flip_probability)


@given(
    height=st.integers(1, 10_000),
    width=st.integers(1, 10_000),
    scale=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted).map(tuple),
    ratio=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted).map(tuple),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_boxes_are_whole_pixels_inside_the_image(height, width, scale, ratio, seed):
    left, top, right, bottom = crops(50, (height, width), scale, ratio, seed=seed).boxes_xyxy.unbind(1)
    for low, high, length in ((left, right, width), (top, bottom, height)):
        assert (low >= 0).all()
        assert (high <= length).all()
        assert (high - low >= 1).all()
        assert (low == low.round()).all()
        assert (high == high.round()).all()


@pytest.mark.parametrize("top_draw", [0.0, 1 - 2**-24])
def test_draws_at_their_limits_stay_inside(top_draw):
    uniform = torch.full((1, DRAWS_PER_CROP), top_draw)
    box = sample_crops(torch.tensor([[9_999.0, 10_000.0]]), uniform, (0.001, 0.002)).boxes_xyxy[0]
    assert box[:2].min() >= 0
    assert box[2] <= 10_000
    assert box[3] <= 9_999


def kolmogorov_smirnov(a, b):
    """Largest distance between two empirical distribution functions."""
    at = torch.cat([a, b]).sort().values
    return max(abs((a <= x).double().mean() - (b <= x).double().mean()).item() for x in at[:: len(at) // 200])


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize("size", [(300, 400), (28, 28), (500, 130), (40, 1000)])
def test_law_is_torchvisions(size, scale):
    count = 1500
    left, top, right, bottom = crops(count, size, scale).boxes_xyxy.unbind(1)
    torch.manual_seed(0)
    image = torch.empty(1, *size)
    reference = torch.tensor([RandomResizedCrop.get_params(image, scale, RATIO) for _ in range(count)]).float()
    ours = {"top": top, "left": left, "height": bottom - top, "width": right - left}
    limit = 1.95 * math.sqrt(2 / count)  # one in a thousand at fixed seeds
    for (name, mine), theirs in zip(ours.items(), reference.T, strict=True):
        assert kolmogorov_smirnov(mine, theirs) < limit, name
    assert kolmogorov_smirnov((right - left) / (bottom - top), reference[:, 3] / reference[:, 2]) < limit
    assert kolmogorov_smirnov((right - left) * (bottom - top), reference[:, 3] * reference[:, 2]) < limit


@pytest.mark.parametrize("size", [(20, 10_000), (10_000, 20), (1, 1), (7, 9)])
def test_fallback_is_torchvisions(size):
    """Areas above the whole image's never fit, so that every crop is the fallback."""
    image, scale = torch.empty(1, *size), (1.7, 1.8)
    top, left, height, width = RandomResizedCrop.get_params(image, scale, RATIO)
    boxes = crops(20, size, scale).boxes_xyxy
    assert torch.equal(boxes, torch.tensor([[left, top, left + width, top + height]]).float().expand(20, 4))


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
def test_flip_probability(probability):
    count = 4000
    share = crops(count, (30, 30), flip_probability=probability).flip.double().mean()
    assert abs(share - probability) <= 3.3 * math.sqrt(probability * (1 - probability) / count)


def test_flip_is_independent_of_the_box():
    result = crops(4000, (300, 400))
    left_of_flipped, left_of_others = (result.boxes_xyxy[mask, 0] for mask in (result.flip, ~result.flip))
    assert kolmogorov_smirnov(left_of_flipped, left_of_others) < 1.95 * math.sqrt(4 / len(result.flip))


def test_each_crop_uses_its_own_image_size():
    sizes = torch.tensor([[10.0, 1000.0], [1000.0, 10.0]])
    uniform = Draws(0, 0).uniform(torch.arange(2), 0, DRAWS_PER_CROP)
    together = sample_crops(sizes, uniform, (0.4, 1.0)).boxes_xyxy
    for row in range(2):
        alone = sample_crops(sizes[row : row + 1], uniform[row : row + 1], (0.4, 1.0)).boxes_xyxy
        assert torch.equal(together[row : row + 1], alone)


def test_scale_boxes_maps_edges_to_edges():
    size = torch.tensor([[100.0, 400.0], [50.0, 50.0]])
    boxes = torch.tensor([[0.0, 0, 400, 100], [10, 20, 30, 45]])
    expected = torch.tensor([[0.0, 0, 64, 32], [12.8, 12.8, 38.4, 28.8]])
    torch.testing.assert_close(scale_boxes(boxes, size, (32, 64)), expected)
