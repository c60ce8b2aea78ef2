import itertools

import kornia.augmentation as K
import kornia.enhance
import pytest
import torch
from kornia.filters import gaussian_blur2d

from ssl_distill.augment.color_ops import NUM_ORDERS, HueTurn, PerImageColorJitter, WholeGaussianBlur


def rows_of(images, module):
    """Each image alone, with its row of what was drawn for the batch."""
    params = {name: value for name, value in module._params.items() if len(value) == len(images)}
    rows = [slice(number, number + 1) for number in range(len(images))]
    return torch.cat([module(images[row], params={name: value[row] for name, value in params.items()}) for row in rows])


@pytest.mark.parametrize(
    "module",
    [
        PerImageColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        HueTurn(0.3, p=0.5),
        WholeGaussianBlur((0.1, 2.0), p=0.5),
    ],
    ids=lambda module: type(module).__name__,
)
def test_are_kornia_modules(module):
    """In a container: shares, replay, parameters of each image's own, masks and keypoints that stay."""
    torch.manual_seed(0)
    images = torch.rand(400, 3, 8, 8)
    changed = module(images)
    share = (changed != images).flatten(1).any(1).float().mean()
    assert abs(share - module.p) < 0.09
    torch.testing.assert_close(rows_of(images, module), changed, rtol=0, atol=1e-5)

    container = K.AugmentationSequential(
        module, K.RandomHorizontalFlip(p=0.5), data_keys=["input", "mask", "keypoints"]
    )
    masks, points = torch.rand(400, 1, 8, 8).round(), torch.rand(400, 2, 2) * 7
    first = container(images, masks, points)
    again = container(images, masks, points, params=container._params)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    flipped = (first[2] - points).abs().amax((1, 2)) > 1e-4
    assert torch.equal(first[1], torch.where(flipped[:, None, None, None], masks.flip(3), masks))
    alike = K.AugmentationSequential(module, same_on_batch=True, data_keys=["input"])
    same = alike(images[:1].expand(4, -1, -1, -1))
    module.same_on_batch = False
    torch.testing.assert_close(same[1:], same[:1].expand(3, -1, -1, -1), rtol=0, atol=0)
    assert module(images[:0]).shape == (0, 3, 8, 8)
    assert type(module).__name__ in repr(module)


def test_jitter_is_kornias_in_each_order():
    torch.manual_seed(0)
    images, ours = torch.rand(NUM_ORDERS, 3, 8, 8), PerImageColorJitter(0.4, 0.4, 0.4, 0.2)
    params = ours.forward_parameters(images.shape)
    params["order"] = torch.arange(NUM_ORDERS).float()
    result = ours(images, params=params)
    for number, order in enumerate(itertools.permutations(range(4))):
        own = {name: value[number : number + 1] for name, value in params.items() if name != "forward_input_shape"}
        own["order"] = torch.tensor(order)
        expected = K.ColorJitter(0.4, 0.4, 0.4, 0.2)(images[number : number + 1], params=own)[0]
        torch.testing.assert_close(result[number], expected, rtol=0, atol=1e-5)
    orders = ours.forward_parameters((2400, 3, 8, 8))["order"].long()
    assert orders.bincount(minlength=NUM_ORDERS).min() > 50  # 100 expected


def test_hue_and_blur_are_kornias():
    torch.manual_seed(0)
    images = torch.rand(5, 3, 16, 16)
    hue, widths = HueTurn((-0.4, 0.4)), WholeGaussianBlur((0.5, 2.0), p=1.0)
    changed = hue(images)
    expected = kornia.enhance.adjust_hue(images, hue._params["hue_factor"] * 2 * torch.pi)
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-5)
    changed = widths(images)
    sigma = widths._params["sigma"][:, None].expand(-1, 2)
    torch.testing.assert_close(changed, gaussian_blur2d(images, 13, sigma, "replicate"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_channels(channels):
    images = torch.rand(3, channels, 9, 9)
    for module, name in ((PerImageColorJitter(hue=0.1), "PerImageColorJitter"), (HueTurn(0.1), "HueTurn")):
        with pytest.raises(
            ValueError, match=rf"`{name}` changes colours of 3 channels \(RGB\), got images of {channels}"
        ):
            module(images)
    assert PerImageColorJitter(0.4, (0.5, 1.5))(images).shape == images.shape
    assert WholeGaussianBlur(p=1.0)(images).shape == images.shape


def test_errors():
    with pytest.raises(ValueError, match=r"`sigma` must be \(smallest, largest\)"):
        WholeGaussianBlur((0.0, 2.0))
    with pytest.raises(ValueError, match="hue_factor out of bounds"):
        PerImageColorJitter(hue=0.7)
