import pickle

import kornia.augmentation as K
import pytest
import torch
import torch.nn.functional as F
from kornia.color import RgbToBgr
from kornia.geometry import Hflip
from torch import nn

from ssl_distill.augment.color import DRAWS_PER_COLOR, ColorRecipe
from ssl_distill.augment.color_ops import PerImageColorJitter
from ssl_distill.augment.kornia_recipe import KorniaRecipe
from ssl_distill.augment.kornia_views import KorniaViews
from ssl_distill.data.batch import ImageBatch
from ssl_distill.draws import Draws

ELASTIC = {"kernel_size": (9, 9), "sigma": (3.0, 3.0), "alpha": (0.3, 0.3), "p": 1.0}
ROW_BY_ROW = {
    "rotation": lambda: K.RandomRotation(30.0, p=0.7),
    "affine": lambda: K.RandomAffine(20.0, (0.1, 0.1), (0.8, 1.2), (5.0, 5.0), p=1.0),
    "filled": lambda: K.RandomAffine(40.0, p=1.0, padding_mode="fill", fill_value=torch.ones(3)),
    "reflected": lambda: K.RandomAffine(40.0, p=1.0, padding_mode="reflection"),
    "perspective": lambda: K.RandomPerspective(0.3, p=1.0),
    "flips": lambda: [K.RandomHorizontalFlip(), K.RandomVerticalFlip()],
    "elastic": lambda: K.RandomElasticTransform(**ELASTIC),
    "spline": lambda: K.RandomThinPlateSpline(0.1, p=1.0),
    "crop": lambda: K.RandomCrop((24, 24), padding=3),
    "chain": lambda: [K.RandomRotation(20.0), PerImageColorJitter(0.4, 0.4, 0.2, 0.1), K.RandomShear(10.0, p=0.5)],
    "nested": lambda: nn.Sequential(K.ImageSequential(K.RandomRotation(20.0), RgbToBgr()), K.RandomGaussianNoise()),
}
ONE_BY_ONE = {
    "one of": lambda: K.ImageSequential(
        K.RandomRotation(60.0, p=1.0), K.RandomElasticTransform(**ELASTIC), random_apply=1
    ),
    "kornia's jitter": lambda: [K.RandomHorizontalFlip(), K.ColorJitter(0.4, 0.4, 0.2, 0.1)],
    "policy": lambda: K.auto.RandAugment(2, 10),
    "share of batches": lambda: K.RandomMotionBlur(3, 35.0, 0.5, p=0.5),
}
PIPELINES = ROW_BY_ROW | ONE_BY_ONE
MOVING = [name for name in [*ROW_BY_ROW, "one of"] if name not in ("filled", "nested")]


def images_and_numbers(count=6, channels=3, size=24):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, channels, size, size, generator=generator)
    return images, torch.rand(count, DRAWS_PER_COLOR, generator=generator)


@pytest.mark.parametrize("name", PIPELINES)
def test_images_do_not_depend_on_company(name):
    images, uniform = images_and_numbers()
    recipe = KorniaRecipe(PIPELINES[name]())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    together = recipe(images, uniform)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(recipe(images, uniform), together)
    again = KorniaRecipe(PIPELINES[name]())  # as in a resumed run
    alone = torch.cat([again(images[i : i + 1], uniform[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    turned_around = recipe(images.flip(0), uniform.flip(0)).flip(0)
    torch.testing.assert_close(turned_around, together, rtol=0, atol=1e-5)
    same_image = recipe(images[:1].expand(6, -1, -1, -1), uniform)
    assert len(same_image.flatten(1).unique(dim=0)) > 1, "every image has numbers of its own"
    assert recipe(images[:0], uniform[:0]).shape == (0, 3, 24, 24)


@pytest.mark.parametrize(("names", "at_once"), [(ROW_BY_ROW, True), (ONE_BY_ONE, False)])
def test_parameters_are_drawn_at_once_where_they_can_be(names, at_once, monkeypatch):
    images, uniform = images_and_numbers()
    for name in names:
        recipe = KorniaRecipe(names[name]())
        recipe(images, uniform)
        other = "_one_by_one" if at_once else "_at_once"
        monkeypatch.setattr(recipe, other, lambda *_: pytest.fail("the wrong way"))
        recipe(images, uniform)


@pytest.mark.parametrize("name", MOVING)
def test_points_land_on_their_pixels(name):
    """Points of the crop, followed into the view, lie on pixels that show them; and masks lie around them."""
    size, (_, uniform) = 24, images_and_numbers()
    recipe = KorniaRecipe(PIPELINES[name]())
    assert recipe.moves_pixels
    pixel_map = recipe.pixel_map((6, 3, size, size), uniform)
    points = torch.rand(6, 60, 2, generator=torch.Generator().manual_seed(1)) * (size - 4) + 2
    there = pixel_map.to_view(points)
    assert there.shown.float().mean() > 0.3

    # Each point as a bright spot of its own, sent through the pipeline itself, colours and all.
    middle = torch.arange(size) + 0.5
    seen, expected = [], []
    for number in range(0, 60, 10):
        spot = points[:, number]
        distance = (middle - spot[:, :1]).square()[:, None] + (middle - spot[:, 1:]).square()[:, :, None]
        picture = torch.exp(-distance / 4)[:, None].expand(-1, 3, -1, -1)
        view = recipe(picture.contiguous(), uniform).mean(1).clamp(min=0)
        view = (view - view.flatten(1).median(1).values[:, None, None]).clamp(min=0).square()
        total = view.sum((1, 2)).clamp(min=1e-9)
        center = torch.stack([(view.sum(1) * middle).sum(1), (view.sum(2) * middle).sum(1)], 1) / total[:, None]
        inner = there.shown[:, number] & ((there.points[:, number] - size / 2).abs() < size / 2 - 4).all(1)
        seen.append(center[inner])
        expected.append(there.points[inner, number])
    distance = (torch.cat(seen) - torch.cat(expected)).norm(dim=1)
    assert len(distance) >= 5
    assert distance.median() < 0.5, distance
    back = pixel_map.to_crop(there.points)
    assert ((back.points - points).norm(dim=-1)[there.shown] < 0.6).float().mean() > 0.98


@pytest.mark.parametrize("name", ["rotation", "affine", "perspective", "flips"])
def test_masks_and_points_are_kornias(name):
    """What kornia's own container does to masks and keypoints under the same parameters."""
    _, uniform = images_and_numbers()
    recipe = KorniaRecipe(PIPELINES[name]())
    masks = (torch.rand(6, 2, 3, 3, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    masks = F.interpolate(masks, size=24)
    points = torch.rand(6, 30, 2, generator=torch.Generator().manual_seed(3)) * 24
    expected_masks, expected_points = [], []

    def work(rows, params):
        container = K.AugmentationSequential(*recipe.pipeline.children(), data_keys=["input", "mask", "keypoints"])
        picture = torch.zeros(len(points[rows]), 3, 24, 24)
        _, mask, point = container(picture, masks[rows], points[rows] - 0.5, params=params)
        expected_masks.append(mask)
        expected_points.append(point + 0.5)
        return picture

    recipe._run((6, 3, 24, 24), uniform, work)
    pixel_map = recipe.pixel_map((6, 3, 24, 24), uniform)
    there = pixel_map.to_view(points)
    # The container works while the recipe is tried, too: the last results are of these numbers.
    assert (there.points - expected_points[-1]).norm(dim=-1)[there.shown].median() < 0.3
    assert (pixel_map.masks(masks) != expected_masks[-1]).float().mean() < 0.06


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_channels(channels):
    images, uniform = images_and_numbers(channels=channels)
    recipe = KorniaRecipe([K.RandomRotation(10.0), K.RandomElasticTransform(**ELASTIC), PerImageColorJitter(0.3, 0.3)])
    assert recipe(images, uniform).shape == images.shape
    for module in (PerImageColorJitter(hue=0.1), K.RandomHue((-0.1, 0.1)), K.RandomPlanckianJitter()):
        broken = KorniaRecipe([K.RandomHorizontalFlip(), module])
        message = f"{type(module).__name__} of `pipeline` cannot change images of {channels} channels and 24 x 24"
        with pytest.raises(ValueError, match=message):
            broken(images, uniform)


def test_a_pipeline_of_a_recipe_is_the_recipe_in_law():
    """Bring your own pipeline: means and deviations of many pixels, ours against the kornia modules."""
    images, uniform = images_and_numbers(1500, size=6)
    changed = KorniaRecipe(ColorRecipe().pipeline())(images, uniform)
    ours = KorniaRecipe(ColorRecipe().pipeline())(images, uniform.flip(1))
    for each in (torch.Tensor.mean, torch.Tensor.std):
        torch.testing.assert_close(each(changed), each(ours), rtol=0.03, atol=0)
    assert (changed != images).flatten(1).any(1).float().mean() > 0.85


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (lambda: K.RandomMixUpV2(), "`pipeline` must not mix images, .* leave out RandomMixUpV2"),
        (lambda: K.RandomHue((0.0, 0.1), same_on_batch=True), "RandomHue has `same_on_batch`=True"),
        (lambda: [K.RandomElasticTransform(same_on_batch=True)], "RandomElasticTransform has `same_on_batch`=True"),
    ],
)
def test_refused_at_construction(pipeline, message):
    with pytest.raises(ValueError, match=message):
        KorniaRecipe(pipeline())


def test_refused_at_the_first_call():
    images, uniform = images_and_numbers()
    with pytest.raises(ValueError, match=r"`pipeline` must keep the size .* \(3, 24, 24\) became \(3, 20, 20\)"):
        KorniaRecipe(K.CenterCrop(20))(images, uniform)
    half = torch.full((3,), 0.5)
    assert KorniaRecipe(K.Normalize(half, half))(images, uniform).min() < 0  # it draws nothing


def test_nobody_knows_where_pixels_went():
    images, uniform = images_and_numbers()
    for module, name in (
        (Hflip(), "Hflip"),
        (K.PatchSequential(K.RandomRotation(9.0), patchwise_apply=False), "PatchSeq"),
    ):
        recipe = KorniaRecipe([module])
        assert recipe.moves_pixels
        assert recipe(images, uniform).shape == images.shape
        with pytest.raises(ValueError, match=f"`pipeline` has {name}.* nobody knows .* and masks must follow"):
            recipe.check_can_follow("masks")
    still = KorniaRecipe([RgbToBgr(), K.RandomErasing(), nn.Identity()])
    assert not still.moves_pixels
    still.check_can_follow("masks")


def test_views_of_a_multi_crop():
    image = torch.randint(256, (5, 3, 40, 40), generator=torch.Generator().manual_seed(0)).byte()
    batch = ImageBatch(image, torch.full((5, 2), 40.0), torch.arange(5))
    augment = KorniaViews(K.RandomSolarize((0.0, 0.0), (0.0, 0.0), p=1.0), [K.RandomInvert(p=0.0)], None, 24, 16, 2)
    views = pickle.loads(pickle.dumps(augment))(batch, Draws(1, 2))
    assert [crops.shape for crops in views] == [(2, 5, 3, 24, 24), (2, 5, 3, 16, 16)]
    alone = augment(ImageBatch(*(part[3:4] for part in batch)), Draws(1, 2))
    for crops, crops_alone in zip(views, alone, strict=True):
        torch.testing.assert_close(crops[:, 3:4], crops_alone, rtol=0, atol=1e-5)
    plain = KorniaViews(nn.Identity(), None, None, 24, 16, 2)(batch, Draws(1, 2))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (augment.mean, augment.std))
    own = [crops * std + mean for crops in views], [crops * std + mean for crops in plain]
    torch.testing.assert_close(own[0][0][0], 1 - own[1][0][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(own[0][0][1], own[1][0][1], rtol=0, atol=1e-5)
    torch.testing.assert_close(own[0][1], 1 - own[1][1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_crops_of_any_number_of_channels(channels):
    image = torch.randint(256, (3, channels, 40, 40)).byte()
    batch = ImageBatch(image, torch.full((3, 2), 40.0), torch.arange(3))
    numbers = {"mean": (0.5,) * channels, "std": (0.2,) * channels}
    augment = KorniaViews([K.RandomRotation(10.0), PerImageColorJitter(0.2, 0.2)], None, None, 24, 16, 2, **numbers)
    assert augment(batch, Draws(0, 0)).global_crops.shape == (2, 3, channels, 24, 24)
