import pytest
import torch

from ssl_distill.augment.color import ColorRecipe
from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.augment.object_crop import ObjectCropAugment
from ssl_distill.augment.objects import BoxObjects, HullObjects, MaskObjects
from ssl_distill.data.batch import ObjectBatch
from ssl_distill.draws import Draws

PLAIN = ColorRecipe(jitter_probability=0.0, greyscale_probability=0.0, blur_probability=0.0)


def crops(**kwargs):
    sizes = {"global_size": 48, "local_size": 16, "num_local": 2, "global_scale": (0.25, 1.0)}
    plain = {"global_recipe_1": PLAIN, "global_recipe_2": PLAIN, "local_recipe": PLAIN}
    return MultiCropAugment(**{**sizes, **plain, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), **kwargs})


def white_ellipses(count=40, size=96):
    """Images with one white object off the middle, wider than high, squashed from 200 x 300 pixels; red elsewhere."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    center = size * (0.35 + 0.3 * torch.rand(count, 2, 1, 1, generator=generator))
    masks = ((x - center[:, 0]) / 24) ** 2 + ((y - center[:, 1]) / 14) ** 2 < 1
    image = (masks[:, None] * torch.tensor([0, 255, 255]).view(3, 1, 1)).to(torch.uint8)
    boxes = torch.stack([bounds(mask) for mask in masks]) / size
    sizes = torch.tensor([[200.0, 300.0]]).expand(count, 2)
    return ObjectBatch(image, sizes, torch.arange(count), boxes[:, None], torch.ones(count).long(), masks[:, None])


def bounds(mask):
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def without_objects(batch):
    return batch._replace(
        num_objects=torch.zeros_like(batch.num_objects),
        boxes_xyxy=torch.zeros_like(batch.boxes_xyxy),
        masks=torch.zeros_like(batch.masks),
    )


def test_attended_patches_are_where_the_object_is_seen():
    """White in each patch of the views, against the masks: wrong crops, flips or axes would show."""
    batch = white_ellipses()
    for threshold in (0.3, 0.7):
        augment = ObjectCropAugment(crops(), patch_size=8, objects=MaskObjects(threshold))
        views = augment(batch, Draws(0, 0))
        white = torch.nn.functional.avg_pool2d(views.global_crops[:, :, 1].flatten(0, 1), 8).view(
            2, len(batch.index), -1
        )
        assert white[views.attend].min() > threshold - 0.1
        assert white[~views.attend].max() < threshold + 0.1
        assert views.attend.any(-1).all()


@pytest.mark.parametrize("objects", [BoxObjects(), MaskObjects(), HullObjects()])
def test_global_crops_show_the_object(objects):
    augment = ObjectCropAugment(crops(global_scale=(0.05, 0.3)), patch_size=8, objects=objects, min_coverage=0.1)
    views = augment(white_ellipses(), Draws(0, 0))
    white = views.global_crops[:, :, 1].mean((2, 3))  # (2, B)
    assert white[~views.fallback].min() > 0.06  # a box is not all white
    assert views.redraws.float().mean() > 0.1
    assert views.valid.all()
    anywhere = ObjectCropAugment(
        crops(global_scale=(0.05, 0.3)), patch_size=8, objects=objects, min_visible=0.0, min_coverage=0.0
    )(white_ellipses(), Draws(0, 0))
    assert anywhere.global_crops[:, :, 1].mean((2, 3)).min() < 0.02
    assert not anywhere.redraws.any()
    assert not anywhere.valid[:2].all()


def test_local_crops_show_the_object():
    shares = [
        ObjectCropAugment(crops(num_local=4, local_scale=(0.05, 0.1)), patch_size=8, local_min_coverage=minimum)(
            white_ellipses(), Draws(0, 0)
        )
        for minimum in (0.0, 0.5)
    ]
    blind, aware = (views.local_crops[:, :, 1].mean((2, 3)) for views in shares)
    assert (aware > 0.4).float().mean() > 0.9
    assert (blind > 0.4).float().mean() < 0.75


def test_an_impossible_rule_takes_the_best_crop():
    """No crop shows all of the object and little else: the whole image shows most of it."""
    augment = ObjectCropAugment(crops(global_scale=(0.05, 0.06)), patch_size=8, min_visible=1.0, min_coverage=0.0)
    views = augment(white_ellipses(), Draws(0, 0))
    assert views.fallback.all()
    assert (views.redraws == augment.tries - 1).all()
    assert views.valid.all()
    torch.testing.assert_close(
        views.global_crops[0, :, 1].mean((1, 2)), white_ellipses().masks.float().mean((1, 2, 3)), rtol=0, atol=0.01
    )


@pytest.mark.parametrize("objects", [BoxObjects(), MaskObjects()])
def test_without_objects(objects):
    batch = without_objects(white_ellipses())
    views = ObjectCropAugment(crops(), patch_size=8, objects=objects)(batch, Draws(0, 0))
    assert views.valid.all()
    assert views.attend.all()
    assert not views.redraws.any()
    skipped = ObjectCropAugment(crops(), patch_size=8, objects=objects, missing="skip")(batch, Draws(0, 0))
    assert not skipped.valid.any()
    assert not skipped.attend.any()
    assert torch.equal(skipped.global_crops, views.global_crops)


def test_small_objects_are_not_chosen():
    views = ObjectCropAugment(crops(), patch_size=8, min_area=0.5, missing="skip")(white_ellipses(), Draws(0, 0))
    assert not views.valid.any()


@pytest.mark.parametrize("missing", ["whole_image", "skip"])
def test_local_crops_that_miss_the_object_teach_nothing(missing):
    """Small objects off the middle, and local crops anywhere: a view is valid where it shows white."""
    batch = white_ellipses(60)
    augment = ObjectCropAugment(crops(), patch_size=8, local_min_coverage=0.0, missing=missing)
    views = augment(batch, Draws(0, 0))
    seen = (views.local_crops[:, :, 1] > 0.5).any(-1).any(-1)
    valid = views.valid[2:]
    assert 0.05 < 1 - valid.float().mean() < 0.7
    assert not (seen & ~valid).any()
    assert (views.local_crops[:, :, 1].mean((-1, -2))[valid] > 0).all()
    assert views.valid[:2].all()


def test_views_do_not_depend_on_company():
    batch = white_ellipses(6)
    augment = ObjectCropAugment(crops(), patch_size=8)
    together = augment(batch, Draws(1, 2))
    for i in range(6):
        alone = augment(ObjectBatch(*(part[i : i + 1] for part in batch)), Draws(1, 2))
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[:, i : i + 1], part)


def test_shapes_without_local_crops():
    views = ObjectCropAugment(crops(num_local=0), patch_size=8)(white_ellipses(3), Draws(0, 0))
    assert views.local_crops.shape == (0, 3, 3, 16, 16)
    assert views.valid.shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ObjectCropAugment(tries=0), "`tries` must be at least 1, got 0"),
        (lambda: ObjectCropAugment(local_tries=0), "`local_tries` must be at least 1, got 0"),
        (lambda: ObjectCropAugment(min_visible=1.5), "`min_visible` must be from 0 to 1, got 1.5"),
        (lambda: ObjectCropAugment(patch_size=15), "`global_size` must be a multiple of `patch_size` 15, got 224"),
        (lambda: BoxObjects(threshold=1.0), "`threshold` must be below 1, the whole patch, got 1.0"),
        (lambda: BoxObjects(margin=-1), "`margin` must be at least 0 patches, got -1"),
        (lambda: HullObjects(margin=-1), "`margin` must be at least 0 patches, got -1"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
