"""What the methods know of places, under pipelines that move pixels: pictures show where they are from."""

import kornia.augmentation as K
import pytest
import torch
import torch.nn.functional as F
from kornia.geometry import Hflip

from ssl_distill.augment.aligned_crop import AlignedCropAugment
from ssl_distill.augment.kornia_recipe import KorniaRecipe
from ssl_distill.augment.kornia_views import KorniaViews
from ssl_distill.augment.masked_image import MaskedImageAugment
from ssl_distill.augment.object_crop import ObjectCropAugment
from ssl_distill.augment.objects import MaskObjects
from ssl_distill.augment.two_view import TwoViewAugment
from ssl_distill.data.batch import ImageBatch, ObjectBatch
from ssl_distill.draws import Draws
from ssl_distill.losses.pixel_pairs import cross_view_aligned

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
PIPELINES = {
    "rotation": lambda: K.RandomAffine(60.0, (0.1, 0.1), (0.8, 1.2), p=0.8, padding_mode="zeros"),
    "perspective": lambda: [K.RandomHorizontalFlip(), K.RandomPerspective(0.4, p=1.0)],
    "elastic": lambda: K.RandomElasticTransform((31, 31), (8.0, 8.0), (1.5, 1.5), p=1.0),
}


def batch_of_places(count=16, size=128):
    """Red grows to the right, green downwards; blue is there."""
    line = torch.linspace(20, 250, size)
    image = torch.stack([line.expand(size, size), line[:, None].expand(size, size), torch.full((size, size), 255.0)])
    sizes = torch.full((count, 2), float(size))
    return ImageBatch(image.round().byte()[None].repeat(count, 1, 1, 1), sizes, torch.arange(count))


def content(views, place):
    """Colours at places from -1 to 1 between the middles of outer pixels."""
    return F.grid_sample(views, place[:, :, None], align_corners=True)[..., 0].transpose(1, 2)


def token_places(positions, grid):
    place = torch.stack([positions.index % grid, positions.index // grid], -1) * (2 / (grid - 1)) - 1.0
    return (place * positions.weight[..., None]).sum(-2) / positions.weight.sum(-1, keepdim=True).clamp(min=1e-6)


@pytest.mark.parametrize("name", PIPELINES)
def test_token_positions(name):
    """UDI: two tokens that are said to be the same point of the image show the same colours."""
    augment = AlignedCropAugment(64, 32, 2, 8, 2, 2, recipe=KorniaRecipe(PIPELINES[name]()), **RAW)
    views = augment(batch_of_places(), Draws(0, 0))
    found = 0
    for source in range(2):
        own, other = ([each[source] for each in positions] for positions in (views.own, views.other))
        own, other = type(views.own)(*own), type(views.own)(*other)
        there = other.weight.sum(-1) > 0.5
        assert torch.equal(there, own.weight.sum(-1) > 0.5)
        colors = content(views.global_crops[source], token_places(own, 8))
        others = content(views.global_crops[1 - source], token_places(other, 8))
        shown = there & (colors[..., 2] > 0.98) & (others[..., 2] > 0.98)  # away from where nothing is
        assert (shown.sum() / there.sum()) > 0.8
        difference = (colors - others)[shown][:, :2].abs()
        assert difference.mean() < 0.012
        assert difference.quantile(0.95) < 0.04
        found += int(shown.sum())
    assert found > 40
    assert views.local.weight.sum() > 10


@pytest.mark.parametrize("name", PIPELINES)
def test_pairs_of_pixels(name):
    """PCD: the teacher's vector for a place is that of the same place of the image."""
    moving = KorniaRecipe(PIPELINES[name]())
    augment = TwoViewAugment(64, (0.5, 1.0), recipe_1=moving, recipe_2=KorniaRecipe(torch.nn.Identity()), **RAW)
    views = augment(batch_of_places(), Draws(0, 0))
    maps = views.images  # a teacher that sees single pixels
    pairs = cross_view_aligned(maps, views)
    shown = pairs.valid & (maps[:, :, 2] > 0.98) & (pairs.targets[:, :, 2] > 0.98)
    assert shown.float().mean() > 0.3
    assert (pairs.valid & ~shown).float().sum() < 0.1 * pairs.valid.sum()
    difference = (pairs.targets - maps).movedim(2, -1)[shown][:, :2].abs()
    assert difference.mean() < 0.006
    assert (difference > 0.03).float().mean() < 0.01


@pytest.mark.parametrize("name", PIPELINES)
def test_attended_patches(name):
    """ODIS: patches that may be attended to show the object's colour."""
    size, count = 96, 24
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    mask = ((x - 40) / 26) ** 2 + ((y - 52) / 12) ** 2 < 1
    image = (mask * torch.tensor([0, 255, 0]).view(3, 1, 1)).byte() + torch.tensor([0, 0, 255]).byte().view(3, 1, 1)
    box = torch.tensor([[[14, 40, 66, 64]]]) / size
    batch = ObjectBatch(
        image[None].repeat(count, 1, 1, 1),
        torch.full((count, 2), 96.0),
        torch.arange(count),
        box.repeat(count, 1, 1),
        torch.ones(count).long(),
        mask[None, None].repeat(count, 1, 1, 1),
    )
    crops = KorniaViews(PIPELINES[name](), None, None, 64, 16, 1, (0.4, 1.0), **RAW)
    views = ObjectCropAugment(crops, patch_size=8, objects=MaskObjects(0.5))(batch, Draws(0, 0))
    share = F.avg_pool2d(views.global_crops[:, :, 1].flatten(0, 1), 8).view(2, count, -1)
    assert views.attend.float().mean() > 0.05
    assert share[views.attend].min() > 0.35
    assert share[~views.attend].max() < 0.65


def test_pipelines_that_cannot_be_followed():
    hidden = KorniaRecipe([Hflip()])
    with pytest.raises(ValueError, match=r"`pipeline` has Hflip, .* and positions of tokens must follow them"):
        AlignedCropAugment(recipe=hidden)
    with pytest.raises(ValueError, match=r"`pipeline` has Hflip, .* and pairs of pixels must follow them"):
        TwoViewAugment(recipe_2=hidden)
    with pytest.raises(ValueError, match=r"`pipeline` has Hflip, .* and masks of objects must follow them"):
        ObjectCropAugment(KorniaViews([Hflip()]))


def test_masked_images():
    """dBOT: hidden patches are numbers of the view's own grid, so that nothing has to follow."""
    batch = batch_of_places(4)
    plain = MaskedImageAugment(32, 8, **RAW)(batch, Draws(0, 0))
    inverted = MaskedImageAugment(32, 8, recipe=KorniaRecipe(K.RandomInvert(p=1.0)), **RAW)(batch, Draws(0, 0))
    torch.testing.assert_close(inverted.images, 1 - plain.images, rtol=0, atol=1e-5)
    assert torch.equal(inverted.hidden, plain.hidden)
