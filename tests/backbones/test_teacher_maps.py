import pytest
import torch
from torch import nn

from ssl_distill.augment.repeated_views import RepeatedViews
from ssl_distill.augment.two_view import TwoViewAugment
from ssl_distill.backbones.teacher_maps import CachedMaps, computed_maps
from ssl_distill.data.batch import ImageBatch
from ssl_distill.draws import Draws
from ssl_distill.views import TwoViews


class CountingTeacher(nn.Module):
    """A map of four channels; counts the images that it saw."""

    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 4, 8, stride=8)
        with torch.no_grad():
            self.convolution.weight.mul_(scale)
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return self.convolution(images)


def views_of(indices, epoch=0, seed=3, size=16, generator_seed=0):
    """Views that are drawn from `generator_seed` and their origin alone."""
    images = [
        torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(generator_seed + 100 * epoch + index))
        for index in indices
    ]
    origin = torch.tensor([[seed, epoch, index] for index in indices])
    count = len(indices)
    return TwoViews(torch.stack(images, 1), torch.zeros(2, count, 4), torch.zeros(2, count).bool(), origin)


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e7])
def test_equals_uncached(scale, tmp_path):
    """Up to half precision of each map's largest value, the first time and later, whatever the batch."""
    teacher, cached = CountingTeacher(scale), CachedMaps(tmp_path)
    first = cached(teacher, views_of([0, 1, 2, 3]))
    again = cached(teacher, views_of([3, 0]))
    expected = computed_maps(teacher, views_of([0, 1, 2, 3])).detach()
    largest = expected.abs().amax((2, 3, 4), keepdim=True)
    torch.testing.assert_close(first / largest, expected / largest, rtol=0, atol=2**-11)
    assert not torch.equal(first, expected)  # it is rounded the first time too
    torch.testing.assert_close(again, first[:, [3, 0]], rtol=0, atol=0)
    assert again.dtype == torch.float32


def test_only_new_views_are_computed(tmp_path):
    teacher = CountingTeacher()
    CachedMaps(tmp_path)(teacher, views_of([0, 1]))
    CachedMaps(tmp_path)(teacher, views_of([1, 2, 0]))  # another run
    assert teacher.seen == 2 * 3
    CachedMaps(tmp_path)(teacher, views_of([0], epoch=1))
    CachedMaps(tmp_path)(teacher, views_of([0], seed=4))
    assert teacher.seen == 2 * 5


def test_another_teacher_has_its_own_maps(tmp_path):
    cached = CachedMaps(tmp_path)
    one, other = CountingTeacher(1.0), CountingTeacher(2.0)
    maps = [cached(teacher, views_of([0])) for teacher in (one, other, one)]
    assert (one.seen, other.seen) == (2, 2)
    assert not torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])


def test_other_pictures_of_the_same_number_are_seen(tmp_path):
    """Another data set or augmentation: its maps take the place of the old ones."""
    teacher, cached = CountingTeacher(), CachedMaps(tmp_path)
    cached(teacher, views_of([0]))
    for size, generator_seed in ((16, 7), (24, 7)):
        views = views_of([0], size=size, generator_seed=generator_seed)
        expected = computed_maps(teacher, views)
        torch.testing.assert_close(cached(teacher, views), expected, rtol=2e-3, atol=2e-3)
    assert teacher.seen == 2 * 5


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "other"])
def test_damaged_files_are_made_again(damage, tmp_path):
    teacher, cached = CountingTeacher(), CachedMaps(tmp_path)
    expected = cached(teacher, views_of([0, 1]))
    file = next(tmp_path.rglob("0.npz"))
    whole = file.read_bytes()
    place = whole.index(b"half.npy") + 200  # in the middle of its numbers
    content = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "flipped": whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :],
        "other": b"something else",
    }
    file.write_bytes(content[damage])
    torch.testing.assert_close(cached(teacher, views_of([0, 1])), expected, rtol=0, atol=0)
    assert teacher.seen == 2 * 3
    assert file.read_bytes() == whole


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(path, **arrays):
        path.write_bytes(b"half a file")
        raise OSError("no space left")

    teacher, cached = CountingTeacher(), CachedMaps(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("numpy.savez", full_disk)
        with pytest.raises(OSError, match="no space left"):
            cached(teacher, views_of([0]))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    cached(teacher, views_of([0]))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["0.npz"]


def test_precision_is_that_of_the_images(tmp_path):
    teacher = CountingTeacher().double()
    views = views_of([0])
    assert CachedMaps(tmp_path)(teacher, views._replace(images=views.images.double())).dtype == torch.float64


def test_real_views_come_again(tmp_path):
    """In other batches of later epochs, from the same data."""
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = RepeatedViews(TwoViewAugment(16), num_epochs=2)
    teacher, cached = CountingTeacher(), CachedMaps(tmp_path)
    for epoch in range(5):
        for index in torch.randperm(5, generator=torch.Generator().manual_seed(epoch)).split(2):
            batch = ImageBatch(pixels[index], torch.full((len(index), 2), 32.0), index)
            views = augment(batch, Draws(0, epoch))
            expected = computed_maps(teacher, views)
            teacher.seen -= 2 * len(index)
            torch.testing.assert_close(cached(teacher, views), expected, rtol=2e-3, atol=2e-3)
    assert teacher.seen == 2 * 5 * 2
