from typing import NamedTuple

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.callbacks.views_picture import draw_views, sample_batch
from ssl_distill.data.batch import ImageBatch


def batch_of(count, size=(32, 32)):
    colors = torch.linspace(0, 255, count).to(torch.uint8).view(count, 1, 1, 1)
    sizes = torch.tensor([size] * count, dtype=torch.float32)
    return ImageBatch(colors.expand(count, 3, 32, 32).clone(), sizes, torch.arange(count))


class Views(NamedTuple):
    image: torch.Tensor
    patch_mask: torch.Tensor


class Normalise(nn.Module):
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def forward(self, batch, draws):
        return Views((batch.image / 255 - 0.5) / 0.25, torch.zeros(len(batch.image), 2, 2))


def test_a_row_per_image_and_a_column_per_view(tmp_path):
    augment = MultiCropAugment(global_size=32, local_size=16, num_local=3)
    draw_views(batch_of(4), augment, tmp_path / "views.png")
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.size == (6 * 100, 16 + 4 * 100)


def test_views_are_shown_un_normalised_and_sources_in_their_shape(tmp_path):
    draw_views(batch_of(2, size=(10, 20)), Normalise(), tmp_path / "views.png")
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.size == (2 * 100, 16 + 2 * 100)  # the mask is no picture
        assert picture.getpixel((150, 16 + 150)) == (255, 255, 255)
        assert picture.getpixel((150, 16 + 50)) == (0, 0, 0)
        assert picture.getpixel((50, 16 + 20)) == (0, 0, 0)
        assert picture.getpixel((50, 16 + 80)) == (255, 255, 255)  # below a source twice as wide as high


class Masked(NamedTuple):
    crops: torch.Tensor
    shown: torch.Tensor
    valid: torch.Tensor


class MaskPatches(nn.Module):
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def forward(self, batch, draws):
        shown = torch.tensor([True, False, False, False]).expand(1, len(batch.image), 4)
        return Masked(batch.image[None] / 255, shown, torch.ones(1, len(batch.image), dtype=torch.bool))


def test_masks_of_patches_grey_what_is_false(tmp_path):
    draw_views(batch_of(2), MaskPatches(), tmp_path / "views.png")
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.size == (3 * 100, 16 + 2 * 100)
        column, row = 200, 16 + 100  # the second image is white
        assert picture.getpixel((column + 20, row + 20)) == (255, 255, 255)
        assert picture.getpixel((column + 20, row + 80)) == (153, 153, 153)
        assert picture.getpixel((column + 80, row + 20)) == (153, 153, 153)


class Numbers(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index


def test_sample_batch_is_spread_over_the_data():
    assert sample_batch(DataLoader(Numbers(), batch_size=2, shuffle=True), 5).tolist() == [0, 2, 4, 6, 8]
    assert len(sample_batch(DataLoader(Numbers()), 20)) == 10
