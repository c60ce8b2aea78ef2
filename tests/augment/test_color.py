import colorsys
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.enhance import solarize
from torchvision.transforms.v2 import functional as torchvision

from ssl_distill.augment.aligned_crop import UDI_COLORS
from ssl_distill.augment.color import DRAWS_PER_COLOR, SOLARIZE_FROM, ColorRecipe, normalize, recolor
from ssl_distill.augment.color_ops import blur, change_where, jitter, shift_hue
from ssl_distill.augment.resample import resample_crops
from ssl_distill.draws import Draws

STEPS = ("brightness", "contrast", "saturation", "hue")
ORDERS = list(itertools.permutations(STEPS))
NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}


def jittered(images, amounts, orders):
    """One dict of amounts and one order of names per image."""
    amounts = [NEUTRAL | amount for amount in amounts]
    factors = torch.tensor([[amount[name] for name in STEPS[:3]] for amount in amounts])
    turn = torch.tensor([amount["hue"] for amount in amounts])
    result = images.clone()
    jitter(result, factors, turn, torch.tensor([ORDERS.index(tuple(order)) for order in orders]))
    return result


def numbers_for(recipe, amounts, order, sigma):
    """The uniform numbers by which `recipe` decides for these amounts, in the order that `decide` reads them."""
    factors = [(amounts[name] - NEUTRAL[name]) / getattr(recipe, name) / 2 + 0.5 for name in STEPS]
    low, high = recipe.blur_sigma
    place = (ORDERS.index(tuple(order)) + 0.5) / 24
    return torch.tensor([0.0, place, *factors, 0.0, 0.0, (sigma - low) / (high - low), 0.0])


def test_golden(golden):
    case = golden("dino/augment_ops")
    expected, params = case.tensors, case.params
    image = expected["image_uint8"][None].float() / 255

    def error(ours, name):
        return (ours * 255 - expected[name]).abs()

    for name in STEPS:
        for i, amount in enumerate(params["factors"][name]):
            for order in (STEPS, STEPS[::-1]):
                difference = error(jittered(image, [{name: amount}], [order])[0], f"{name}_{i}")
                assert difference.max() <= (12 if name == "hue" else 2), name
                assert difference.mean() <= 1, name
    assert error(rgb_to_grayscale(image)[0], "grayscale").max() <= 1
    assert error(solarize(image, SOLARIZE_FROM)[0], "solarize_128").max() <= 1e-4
    for i, sigma in enumerate(params["blur_radius"]):
        difference = error(blur(image, torch.tensor([sigma]), max(params["blur_radius"]))[0], f"blur_{i}")
        assert difference.max() <= 7
        assert difference.mean() <= 0.9
    normalized = normalize(image.clone(), params["mean"], params["std"])[0]
    assert (normalized - expected["normalized"]).abs().max() <= 1e-6


def test_golden_chain(golden):
    """The whole second global view, by the public functions and by the uniform numbers that lead to it."""
    case = golden("dino/augment_ops")
    chain = case.params["chain"]
    top, left, height, width, size = chain["box"]
    box = torch.tensor([[left, top, left + width, top + height]]).float()
    crop = resample_crops(
        case.tensors["image_uint8"][None], torch.tensor([0]), box, torch.tensor([chain["hflip"]]), size
    )
    recipe = ColorRecipe(1.0, 1.0, 1.0, 1.0, 0.5, float(chain["grayscale"]), 1.0, (0.1, 5.0), float(chain["solarize"]))
    amounts = {name: case.params["factors"][name][chain["factor_index"]] for name in STEPS}
    uniform = numbers_for(recipe, amounts, chain["color_order"], chain["blur_radius"])
    view = normalize(recolor(crop[None], [recipe], uniform[None, None]), case.params["mean"], case.params["std"])
    difference = (view[0, 0] - case.tensors["chain_global2"]).abs()
    assert difference.mean() <= 0.05
    assert (difference > 0.15).double().mean() <= 0.01


def test_each_image_has_its_own_order():
    """All 24 orders in one batch, with factors that clamp, against torchvision one by one."""
    torch.manual_seed(0)
    images = torch.rand(24, 3, 9, 7)
    amount = {"brightness": 1.6, "contrast": 1.7, "saturation": 1.8, "hue": 0.2}
    ours = jittered(images, [amount] * 24, ORDERS)
    for image, result, order in zip(images, ours, ORDERS, strict=True):
        expected = image
        for name in order:
            expected = getattr(torchvision, f"adjust_{name}")(expected, amount[name])
        torch.testing.assert_close(result, expected, rtol=0, atol=5e-4)  # torchvision's luma weights have 4 digits
    first, last = ours[0].view(-1), jittered(images[:1], [amount], ORDERS[-1:])[0].view(-1)
    assert (first - last).abs().max() > 0.1


def test_each_image_has_its_own_amounts():
    torch.manual_seed(0)
    images, uniform = torch.rand(2, 5, 3, 8, 8), torch.rand(2, 5, DRAWS_PER_COLOR)
    recipes = [ColorRecipe(solarize_probability=0.5), ColorRecipe(blur_probability=1.0)]
    together = recolor(images.clone(), recipes, uniform)
    for view, number in itertools.product(range(2), range(5)):
        one = images[view, number].clone()[None, None]
        alone = recolor(one, [recipes[view]], uniform[view, number][None, None])[0, 0]
        assert torch.equal(together[view, number], alone)


def test_hue_is_exact():
    torch.manual_seed(0)
    images = torch.rand(5, 3, 6, 6)
    images[0, :, 0] = torch.tensor([[0.0, 1.0, 0.3, 0.5, 0.5, 0.7]])  # grey
    images[1, :, 0] = torch.tensor([[1.0, 1, 0, 0, 0, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]])  # pure colours
    turn = torch.tensor([0.0, -0.5, 0.5, 0.1, -1 / 3])
    for image, result, by in zip(images, shift_hue(images, turn), turn.tolist(), strict=True):
        for before, after in zip(image.flatten(1).T.tolist(), result.flatten(1).T.tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*before)
            assert after == pytest.approx(colorsys.hsv_to_rgb((hue + by) % 1, saturation, value), abs=2e-6)


def test_blur_is_gaussian_with_repeated_borders():
    torch.manual_seed(0)
    images, sigma = torch.rand(3, 3, 12, 10), torch.tensor([0.1, 0.9, 2.0])
    for image, result, width in zip(images, blur(images, sigma, 2.0), sigma.tolist(), strict=True):
        padded = F.pad(image[None], [20] * 4, mode="replicate")
        expected = torchvision.gaussian_blur(padded, [13, 13], [width, width])[0, :, 20:-20, 20:-20]
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_grey_images_stay_grey():
    """Data with three equal channels (Fashion-MNIST) under the whole chain."""
    images = torch.rand(1, 64, 1, 8, 8).expand(-1, -1, 3, -1, -1).clone()
    result = recolor(images, [ColorRecipe(solarize_probability=0.5)], torch.rand(1, 64, DRAWS_PER_COLOR))
    torch.testing.assert_close(result[:, :, 0], result[:, :, 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(result[:, :, 0], result[:, :, 2], rtol=0, atol=1e-6)


def test_strength_zero_skips_a_step():
    decisions = ColorRecipe(1.0, saturation=0, hue=0).decide(torch.rand(100, DRAWS_PER_COLOR))
    assert (decisions.factors[:, 2] == 1).all()
    assert (decisions.turn == 0).all()
    assert (decisions.factors[:, :2] != 1).any(dim=0).all()


def test_probabilities_and_ranges():
    count = 20_000
    recipe = ColorRecipe(0.8, 0.4, 0.3, 0.2, 0.1, 0.25, 0.6, (0.1, 2.0), 0.15)
    decisions = recipe.decide(Draws(0, 0).uniform(torch.arange(count), 0, DRAWS_PER_COLOR))
    jittered = decisions.turn != 0

    def deviations(happened, probability):
        return abs(happened.double().mean() - probability) / math.sqrt(probability * (1 - probability) / len(happened))

    for happened, probability in (
        (jittered, 0.8),
        (decisions.greyscale, 0.25),
        (decisions.blur, 0.6),
        (decisions.solarize, 0.15),
        (decisions.greyscale[jittered], 0.25),  # independent of each other
        (decisions.blur[decisions.greyscale], 0.6),
        (decisions.solarize[decisions.blur], 0.15),
    ):
        assert deviations(happened, probability) < 3.5
    for order in range(24):
        assert deviations(decisions.order == order, 1 / 24) < 4

    assert (decisions.factors[~jittered] == 1).all()
    drawn = torch.cat([decisions.factors, decisions.turn[:, None]], dim=1)[jittered].T
    ranges = [(0.6, 1.4), (0.7, 1.3), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)]
    for values, (low, high) in zip([*drawn, decisions.sigma], ranges, strict=True):
        assert low - 1e-6 <= values.min() < low + 0.002 * (high - low)
        assert high + 1e-6 >= values.max() > high - 0.002 * (high - low)
        quarters = torch.histc((values - low) / (high - low), 4, 0, 1) / len(values)
        assert (quarters - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / len(values))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"jitter_probability": 1.5}, "`jitter_probability` must be from 0 to 1, got 1.5"),
        ({"greyscale_probability": -0.1}, "`greyscale_probability` must be from 0 to 1, got -0.1"),
        ({"blur_probability": float("nan")}, "`blur_probability` must be from 0 to 1, got nan"),
        ({"solarize_probability": 2}, "`solarize_probability` must be from 0 to 1, got 2"),
        ({"brightness": -0.4}, r"`brightness` must be from 0 \(off\) to 1, got -0.4"),
        ({"hue": 0.6}, r"`hue` must be from 0 \(off\) to 0.5, got 0.6"),
        ({"blur_sigma": (0.0, 2.0)}, r"`blur_sigma` must be \(smallest, largest\) .* got \(0.0, 2.0\)"),
        ({"blur_sigma": (2.0, 1.0)}, r"`blur_sigma` must be \(smallest, largest\) .* got \(2.0, 1.0\)"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ColorRecipe(**arguments)


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_pipeline_is_the_recipe(channels):
    """The kornia modules of a recipe, given what it decided, against the fast path."""
    color = {} if channels == 3 else {"saturation": 0.0, "hue": 0.0, "greyscale_probability": 0.0}
    recipe = ColorRecipe(solarize_probability=0.5, **color)
    images, uniform = torch.rand(64, channels, 12, 10), torch.rand(64, DRAWS_PER_COLOR)
    decided = recipe.decide(uniform)
    pipeline = recipe.pipeline()
    params = pipeline.forward_parameters(images.shape)
    names = ("brightness_factor", "contrast_factor", "saturation_factor")
    params[0].data.update(zip(names, decided.factors.unbind(1), strict=True))
    params[0].data.update(hue_factor=decided.turn, order=decided.order, batch_prob=torch.ones(64))
    params[1].data.update(batch_prob=decided.greyscale.float())
    params[2].data.update(batch_prob=decided.blur.float(), sigma=decided.sigma)
    params[3].data.update(batch_prob=decided.solarize.float())
    expected = pipeline(images, params=params)
    assert (expected - images).abs().flatten(1).amax(1).gt(0.05).float().mean() > 0.5
    torch.testing.assert_close(recolor(images.clone()[None], [recipe], uniform[None])[0], expected, rtol=0, atol=1e-5)


def test_blur_and_solarisation_fall_together_as_often_as_said():
    uniform = Draws(0, 0).uniform(torch.arange(40_000), 0, DRAWS_PER_COLOR)
    decided = UDI_COLORS.decide(uniform)
    shares = [each.float().mean().item() for each in (decided.blur, decided.solarize, decided.blur & decided.solarize)]
    assert shares == pytest.approx([0.425, 0.1, 0.01], abs=0.007)
    independent = replace(UDI_COLORS, both_probability=None).decide(uniform)
    assert (independent.blur & independent.solarize).float().mean() == pytest.approx(0.0425, abs=0.005)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_channels(channels):
    images, uniform = torch.rand(1, 4, channels, 6, 6), torch.rand(1, 4, DRAWS_PER_COLOR)
    for recipe, operator in (
        (ColorRecipe(greyscale_probability=0), "ColorRecipe.jitter"),
        (ColorRecipe(saturation=0, hue=0), "ColorRecipe.greyscale"),
    ):
        with pytest.raises(
            ValueError, match=f"`{operator}` changes colours of 3 channels .* images of {channels}; set"
        ):
            recolor(images, [recipe], uniform)
    without_color = ColorRecipe(1.0, saturation=0, hue=0, greyscale_probability=0, blur_probability=1)
    changed = normalize(recolor(images.clone(), [without_color], uniform), [0.5] * channels, [0.2] * channels)
    assert changed.shape == images.shape
    for mean, std in (([0.5] * 2, [0.2] * channels), ([0.5] * channels, [0.2] * 2)):
        with pytest.raises(ValueError, match=f"`mean` and `std` must have one number per channel, {channels} here"):
            normalize(images, mean, std)


def test_a_gpu_is_never_waited_for():
    """On the meta device there are no values to wait for."""
    recipes = [ColorRecipe(solarize_probability=0.5), ColorRecipe(blur_probability=0.1)]
    crops, uniform = torch.rand(2, 5, 3, 16, 16, device="meta"), torch.rand(2, 5, DRAWS_PER_COLOR, device="meta")
    assert normalize(recolor(crops, recipes, uniform), [0.5] * 3, [0.5] * 3).shape == crops.shape


def test_both_ways_to_choose_agree():
    """Rows taken out and put back, as on a CPU, and masks, as on a GPU."""
    images, chosen, amount = torch.rand(6, 3, 5, 5), torch.tensor([1, 0, 1, 0, 0, 1]).bool(), torch.rand(6)

    def change(images, amount):
        return (images * amount[:, None, None, None]).mean(1, keepdim=True)

    expected = torch.where(chosen[:, None, None, None], change(images, amount), images)
    change_where(chosen, images, change, amount)
    assert torch.equal(images, expected)
