import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from ssl_distill.augment.base import CutBatch
from ssl_distill.augment.crops import RandomCrop, check_channels, cut_crops
from ssl_distill.augment.geometry import CropBoxes
from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.data.batch import ImageBatch, source_sizes
from ssl_distill.draws import Draws

SIZES = [(90, 120), (61, 61), (40, 200)]


def pictures():
    """Images of several sizes, rough enough to tell filters apart."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in SIZES]


def places_of(images, views=4, seed=0):
    uniform = torch.rand(views, len(images), 23, generator=torch.Generator().manual_seed(seed))
    return RandomCrop(24, (0.1, 1.0)).place(source_sizes(images), uniform)


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_images_of_any_sizes_are_cut_as_pil_cuts_them(filter):
    images = pictures()
    places = places_of(images)
    crops = cut_crops(images, source_sizes(images), places, 24, filter)
    assert crops.dtype == torch.uint8
    kernel = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[filter]
    assert places.flip.any()
    assert not places.flip.all()
    for view in range(4):
        for number, image in enumerate(images):
            box = places.boxes_xyxy[view, number].int().tolist()
            expected = F.pil_to_tensor(F.to_pil_image(image).crop(box).resize((24, 24), kernel))
            expected = expected.flip(2) if places.flip[view, number] else expected
            assert (crops[view, number].int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_a_stack_is_cut_as_a_list_is(filter):
    images = [64 + image[:, :40, :61] // 2 for image in pictures()]  # bytes are clipped between the two directions
    places = places_of(images)
    of_list = cut_crops(images, source_sizes(images), places, 24, filter).float() / 255
    of_stack = cut_crops(torch.stack(images), source_sizes(images), places, 24, filter)
    assert (of_list - of_stack).abs().max() <= 1.1 / 255


def test_a_stretched_stack_is_cut_where_its_images_are():
    ramp = torch.linspace(0, 255, 200).byte().expand(3, 100, 200)
    squashed = F.resize(ramp, [80, 80], antialias=True)[None]
    places = CropBoxes(torch.tensor([[[100.0, 0, 200, 100]]]), torch.zeros(1, 1, dtype=torch.bool))
    crop = cut_crops(squashed, torch.tensor([[100.0, 200.0]]), places, 20)[0, 0]
    assert crop[:, :, 0].mean() == pytest.approx(0.5, abs=0.02)


def test_what_a_loader_process_cut_is_what_the_device_would_cut():
    images = [image[:, :40, :61].contiguous() for image in pictures()]
    augment = MultiCropAugment(24, 12, num_local=2)
    batch = ImageBatch(torch.stack(images), source_sizes(images), torch.tensor([5, 3, 9]))
    whole = augment(batch, Draws(1, 2))
    cut = CutBatch(augment.cut(batch._replace(image=images), Draws(1, 2)), batch.index)
    for ours, expected in zip(augment(cut, Draws(1, 2)), whole, strict=True):
        difference = (ours - expected).abs()
        assert difference.mean() < 0.01  # bytes in between
        assert difference.max() < 0.2


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), (0.2, 0.2), "a number for every channel"),
        ((0.5, 0.5), (0.2, 0.0), r"`std` must be positive in every channel, got \(0.2, 0.0\)"),
    ],
)
def test_errors(mean, std, message):
    with pytest.raises(ValueError, match=message):
        check_channels(mean, std)
