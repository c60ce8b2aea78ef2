import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from ssl_distill.augment.color import ColorRecipe
from ssl_distill.augment.multi_crop import MultiCropAugment, v2_as_run
from ssl_distill.data.batch import ImageBatch
from ssl_distill.draws import Draws

PLAIN = ColorRecipe(0.0, greyscale_probability=0.0, blur_probability=0.0)


def random_batch(count=6, square=40):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (count, 3, square, square), generator=generator, dtype=torch.uint8)
    size = torch.randint(20, 500, (count, 2), generator=generator).float()
    return ImageBatch(image, size, torch.arange(count) + 100)


def rows(batch, chosen):
    return ImageBatch(*(field[chosen] for field in batch))


def small(**kwargs):
    return MultiCropAugment(**{"global_size": 32, "local_size": 16, "num_local": 3} | kwargs)


def without_colors(**kwargs):
    recipes = dict.fromkeys(("global_recipe_1", "global_recipe_2", "local_recipe"), PLAIN)
    return small(mean=(0, 0, 0), std=(1, 1, 1), **recipes, **kwargs)


def test_shapes():
    batch = random_batch()
    views = small()(batch, Draws(0, 0))
    assert views.global_crops.shape == (2, 6, 3, 32, 32)
    assert views.local_crops.shape == (3, 6, 3, 16, 16)
    assert views.global_crops.dtype == torch.float32
    no_locals = small(num_local=0)(batch, Draws(0, 0))
    assert no_locals.local_crops.shape == (0, 6, 3, 16, 16)
    assert torch.equal(no_locals.global_crops, views.global_crops)
    larger_than_the_image = small(global_size=100)(batch, Draws(0, 0)).global_crops
    assert larger_than_the_image.shape == (2, 6, 3, 100, 100)


@pytest.mark.parametrize("size", [16, 160])
def test_views_do_not_depend_on_the_batch(size):
    """Bit-equal in another order and alone; at 160 px the batch is also worked off in several parts."""
    batch, augment = random_batch(12), small(global_size=size, local_size=24, num_local=4)
    whole = augment(batch, Draws(3, 5))
    for chosen in (torch.randperm(12, generator=torch.Generator().manual_seed(1)), torch.arange(5), torch.tensor([7])):
        part = augment(rows(batch, chosen), Draws(3, 5))
        for all_crops, crops in zip(whole, part, strict=True):
            assert torch.equal(all_crops[:, chosen], crops)


def test_seed_epoch_index_and_view_all_matter():
    batch, augment = random_batch(), small()
    views = augment(batch, Draws(3, 5))
    others = [
        augment(batch, Draws(4, 5)),
        augment(batch, Draws(3, 6)),
        augment(batch._replace(index=batch.index + 6), Draws(3, 5)),
    ]
    for other in others:
        for crops, changed in zip(views, other, strict=True):
            assert ((crops - changed).abs().amax(dim=(2, 3, 4)) > 0.1).all()
    for crops in views:
        assert ((crops[0] - crops[1]).abs().amax(dim=(1, 2, 3)) > 0.1).all()


def test_more_local_crops_keep_the_others():
    few, many = (small(num_local=number)(random_batch(), Draws(0, 0)).local_crops for number in (2, 5))
    assert torch.equal(few, many[:2])


def test_crops_follow_the_law_in_the_original_image():
    """The squashed image holds its own coordinates, so that a crop shows where it was cut."""
    count, square, (height, width) = 400, 240, (100.0, 380.0)
    ramp = torch.arange(square, dtype=torch.uint8)
    image = torch.stack(
        [ramp.expand(square, square), ramp[:, None].expand(square, square), torch.zeros(square, square)]
    )
    batch = ImageBatch(
        image.byte().expand(count, 3, -1, -1), torch.tensor([[height, width]]).expand(count, 2), torch.arange(count)
    )
    views = without_colors(flip_probability=0.3)(batch, Draws(0, 0))
    for crops, scale in zip(views, [(0.4, 1.0), (0.05, 0.4)], strict=True):
        size = crops.shape[-1]
        x, y = crops[..., 0, size // 2, :] * 255, crops[..., 1, :, size // 2] * 255
        inner = slice(size // 4, size - size // 4)
        share_x, share_y = (  # of the image, from the slope away from the borders
            (place[..., inner][..., -1] - place[..., inner][..., 0]) / (size // 2 - 1) * size / square
            for place in (x, y)
        )
        assert (share_y > 0).all()
        assert (share_x < 0).double().mean() == pytest.approx(0.3, abs=3.5 * (0.21 / share_x.numel()) ** 0.5)
        share_x = share_x.abs()
        area, ratio = share_x * share_y, share_x * width / (share_y * height)
        fallback = share_y > 0.99  # in so wide an image few boxes fit, and a centre crop is the last resort
        assert (ratio > 0.71).all()
        assert (ratio < 1.4).all()
        assert (area[~fallback] > scale[0] * 0.93).all()
        assert (area[~fallback] < scale[1] * 1.07).all()


def test_normalisation_comes_last():
    plain = without_colors()(random_batch(), Draws(0, 0))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    recipes = dict.fromkeys(("global_recipe_1", "global_recipe_2", "local_recipe"), PLAIN)
    normalized = small(mean=mean, std=std, **recipes)(random_batch(), Draws(0, 0))
    for raw, ours in zip(plain, normalized, strict=True):
        assert 0 <= raw.min() <= raw.max() <= 1
        torch.testing.assert_close(ours, (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))


def test_each_view_follows_its_recipe():
    """Solarised flat black stays black, flat white turns black; only the view whose recipe says so."""
    white = ImageBatch(torch.full((8, 3, 20, 20), 255, dtype=torch.uint8), torch.full((8, 2), 20.0), torch.arange(8))
    always = ColorRecipe(0.0, greyscale_probability=0.0, blur_probability=0.0, solarize_probability=1.0)
    raw = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    views = small(global_recipe_1=PLAIN, global_recipe_2=always, local_recipe=PLAIN, **raw)(white, Draws(0, 0))
    assert torch.allclose(views.global_crops[0], torch.tensor(1.0))
    assert torch.allclose(views.global_crops[1], torch.tensor(0.0), atol=1e-5)
    assert torch.allclose(views.local_crops, torch.tensor(1.0))


def test_autocast_changes_nothing():
    expected = small()(random_batch(), Draws(0, 0))
    with torch.autocast("cpu", torch.bfloat16):
        ours = small()(random_batch(), Draws(0, 0))
    for crops, same in zip(expected, ours, strict=True):
        assert torch.equal(crops, same)


def test_presets():
    default = MultiCropAugment()
    recipes = (*default.global_recipes, default.local_recipes[0])
    assert [recipe.blur_probability for recipe in recipes] == [1.0, 0.1, 0.5]
    assert [recipe.solarize_probability for recipe in recipes] == [0.0, 0.2, 0.0]
    v2 = v2_as_run()
    recipes = (*v2.global_recipes, v2.local_recipes[0])
    assert [recipe.blur_probability for recipe in recipes] == [0.0, 0.9, 0.5]
    assert (v2.global_crop.scale, v2.local_crop.scale) == ((0.32, 1.0), (0.05, 0.32))


@pytest.mark.filterwarnings("ignore")  # of jsonargparse about its own old names
def test_yaml_states_only_what_differs():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--augment", type=nn.Module)
    here = "ssl_distill.augment.multi_crop"
    changes = {"num_local": 2, "local_scale": [0.1, 0.3], "global_recipe_2": {"hue": 0, "blur_sigma": [0.1, 1.0]}}
    config = parser.parse_object({"augment": {"class_path": f"{here}.MultiCropAugment", "init_args": changes}})
    augment = parser.instantiate_classes(config).augment
    assert (augment.num_local, augment.local_crop.scale) == (2, (0.1, 0.3))
    assert augment.global_recipes[1] == ColorRecipe(
        hue=0, blur_probability=0.1, blur_sigma=(0.1, 1.0), solarize_probability=0.2
    )
    assert augment.global_recipes[0] == MultiCropAugment().global_recipes[0]
    config = parser.parse_object({"augment": {"class_path": f"{here}.v2_as_run", "init_args": {"num_local": 1}}})
    assert parser.instantiate_classes(config).augment.global_recipes[1].blur_probability == 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_size": 0}, "`global_size` must be at least 1 pixel, got 0"),
        ({"local_size": -3}, "`local_size` must be at least 1 pixel, got -3"),
        ({"num_local": -1}, "`num_local` must be at least 0 .* got -1"),
        ({"global_scale": (0.0, 1.0)}, r"`global_scale` must be .* 0 < smallest <= largest <= 1, got \(0.0, 1.0\)"),
        ({"local_scale": (0.05, 1.4)}, r"`local_scale` must be .* 0 < smallest <= largest <= 1, got \(0.05, 1.4\)"),
        ({"local_scale": (0.5, 0.4)}, r"`local_scale` must be .* got \(0.5, 0.4\)"),
        ({"ratio": (2.0, 1.0)}, r"`ratio` must be .* 0 < smallest <= largest, got \(2.0, 1.0\)"),
        ({"flip_probability": 1.1}, "`flip_probability` must be from 0 to 1, got 1.1"),
        ({"std": (0.2, 0.0, 0.2)}, r"`std` must be positive in every channel, got \(0.2, 0.0, 0.2\)"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiCropAugment(**arguments)
