import pytest
import torch

from ssl_distill.augment.color import ColorRecipe
from ssl_distill.augment.two_view import TwoViewAugment
from ssl_distill.data.batch import ImageBatch
from ssl_distill.draws import Draws

PLAIN = ColorRecipe(jitter_probability=0, greyscale_probability=0, blur_probability=0)


def batch_of(count):
    image = torch.randint(0, 256, (count, 3, 40, 40), generator=torch.Generator().manual_seed(0)).byte()
    return ImageBatch(image, torch.tensor([[50.0, 80.0]]).repeat(count, 1), torch.arange(count))


def test_views_replay_and_do_not_depend_on_company():
    augment, batch = TwoViewAugment(24), batch_of(5)
    views = augment(batch, Draws(1, 2))
    assert views.images.shape == (2, 5, 3, 24, 24)
    alone = augment(ImageBatch(*(part[3:4] for part in batch)), Draws(1, 2))
    assert torch.equal(views.origin[3:4], alone.origin)
    for part, part_alone in zip(views[:3], alone[:3], strict=True):
        torch.testing.assert_close(part[:, 3:4], part_alone, rtol=1e-5, atol=1e-5)
    other = augment(batch, Draws(1, 3))
    assert (other.images - views.images).abs().mean() > 0.1
    assert (views.boxes_xyxy[0] != views.boxes_xyxy[1]).any(1).all()


def test_boxes_say_where_views_lie():
    """The whole image in both views; one mirrored."""
    augment = TwoViewAugment(
        40, (1, 1), (1.6, 1.6), flip_probability=0.5, recipe_1=PLAIN, recipe_2=PLAIN, mean=(0, 0, 0), std=(1, 1, 1)
    )
    batch = batch_of(8)
    views = augment(batch, Draws(0, 0))
    torch.testing.assert_close(views.boxes_xyxy, torch.tensor([0.0, 0, 80, 50]).expand(2, 8, 4))
    image = batch.image / 255
    expected = torch.where(views.flip[..., None, None, None], image.flip(-1), image)
    torch.testing.assert_close(views.images, expected, rtol=0, atol=1e-4)
    assert 0 < views.flip.float().mean() < 1


def test_recipes_by_view():
    bright = ColorRecipe(1.0, 0, 0, 0, 0, 0, 0, solarize_probability=1.0)
    augment = TwoViewAugment(
        40, (1, 1), (1.6, 1.6), 0.0, recipe_1=PLAIN, recipe_2=bright, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    views = augment(batch_of(2), Draws(0, 0)).images
    assert views[0].max() > 0.9
    assert views[1].max() < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_size": 0}, "`global_size` must be at least 1 pixel, got 0"),
        ({"scale": (0.5, 1.5)}, "`scale` must be"),
        ({"flip_probability": 2.0}, "`flip_probability` must be from 0 to 1, got 2.0"),
        ({"std": (0.0, 1.0, 1.0)}, "`std` must be positive in every channel"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        TwoViewAugment(**arguments)
