import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ssl_distill.data.images import evaluation_view, read_image


def smooth(width=40, height=30):
    """A picture that JPEG hardly changes, without any symmetry."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = 255 * x / width, 255 * y / height, 127 * (x / width + (y / height) ** 2)
    return np.stack(channels, 2).astype(np.uint8)


def pixels(image):
    return image.permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png", "a.webp", "a.bmp", "a.tif", "a.tiff"])
def test_rgb(tmp_path, name):
    Image.fromarray(smooth()).save(tmp_path / name, quality=98)
    assert np.abs(pixels(read_image(tmp_path / name)) - smooth()).max() <= 8


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_by_exif(tmp_path, name, orientation):
    stored = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    stored |= {5: lambda a: a.transpose(1, 0, 2), 6: np.rot90, 8: lambda a: np.rot90(a, -1)}
    stored[7] = lambda a: np.rot90(a, 2).transpose(1, 0, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored[orientation](smooth()))).save(tmp_path / name, exif=exif, quality=98)
    assert np.abs(pixels(read_image(tmp_path / name)) - smooth()).max() <= 8


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk(tmp_path, name):
    Image.fromarray(smooth()).convert("CMYK").save(tmp_path / name, quality=98)
    assert np.abs(pixels(read_image(tmp_path / name)) - smooth()).max() <= 8


def test_sixteen_bits_are_scaled(tmp_path):
    deep = np.linspace(0, 65535, 16 * 24).astype(np.uint16).reshape(16, 24)
    expected = (deep / 257).round()
    Image.fromarray(deep).save(tmp_path / "grey.png")
    Image.fromarray(deep).save(tmp_path / "grey.tif")
    big_endian = np.stack([deep] * 3, 2).astype(">u2")
    (tmp_path / "rgb.png").write_bytes(png16(big_endian))
    for name in ("grey.png", "grey.tif", "rgb.png"):
        assert np.abs(pixels(read_image(tmp_path / name)) - expected[..., None]).max() <= 1


def png16(rgb):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = rgb.shape
    rows = b"".join(b"\0" + row.tobytes() for row in rgb)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_transparent_parts_show_white(tmp_path):
    red_to_clear = np.zeros((4, 5, 4), np.uint8)
    red_to_clear[..., 0], red_to_clear[..., 3] = 255, [255, 204, 102, 51, 0]
    Image.fromarray(red_to_clear).save(tmp_path / "rgba.png")
    expected = [0, 51, 153, 204, 255]
    assert np.abs(pixels(read_image(tmp_path / "rgba.png"))[0, :, 1] - expected).max() <= 1
    Image.fromarray(red_to_clear).save(tmp_path / "rgba.webp", lossless=True)
    assert np.abs(pixels(read_image(tmp_path / "rgba.webp"))[0, :, 1] - expected).max() <= 1

    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert pixels(read_image(tmp_path / "palette.png")).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_suffix_may_be_wrong(tmp_path):
    Image.fromarray(smooth()).save(tmp_path / "a.jpg", "PNG")
    assert (pixels(read_image(tmp_path / "a.jpg")) == smooth()).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
@pytest.mark.parametrize("damage", ["missing", "empty", "text", "half", "header"])
def test_errors(tmp_path, suffix, damage):
    path = tmp_path / f"bad.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(
        {"half": whole[: len(whole) // 2], "header": whole[:20], "text": b"no image " * 9}.get(damage, b"")
    )
    if damage == "missing":
        path.unlink()
    with pytest.raises(OSError, match=rf"cannot read .*bad.{suffix}"):
        read_image(path)


def test_views_of_extreme_shapes():
    for height, width in ((1, 1), (20, 10_000), (10_000, 20), (3, 500)):
        image = torch.full((3, height, width), 77, dtype=torch.uint8)
        view = evaluation_view(image, 96)
        assert view.shape == (3, 96, 96)
        assert (view == 77).all()


def test_evaluation_view_is_resize_and_centre_crop():
    image = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8)
    for size, shorter in ((224, 256), (96, 110), (32, 32)):
        resized = F.resize(image, [shorter], InterpolationMode.BICUBIC, antialias=True)
        assert resized.shape[1] == shorter
        assert torch.equal(evaluation_view(image, size), F.center_crop(resized, [size, size]))
