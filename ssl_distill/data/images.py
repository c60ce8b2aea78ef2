"""Files to RGB bytes."""

import io
import os
import warnings

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ssl_distill.data.files import read_bytes
from ssl_distill.data.names import escaped

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MOST_PIXELS = 2**27  # of a picture, 400 MB as RGB bytes: a file of 600 bytes may claim eight times as many

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # PIL has readers that start programs


def read_image(path: str | os.PathLike[str]) -> UInt8[Tensor, "3 H W"]:
    """Read a file; see `decode`.

    Raises:
        OSError: As there; or if the file is missing, or is none but a FIFO or a device.
    """
    try:
        content = read_bytes(path)
    except OSError as error:
        raise OSError(f"cannot read {escaped(os.fspath(path))}: {error.strerror or error}") from error
    return decode(content, escaped(os.fspath(path)))


def open_image(content: bytes, name: str) -> Image.Image:
    """A picture of which only the header is read.

    Args:
        content: All bytes of the file.
        name: What to call it in an error.

    Raises:
        OSError: If it is no image of a known format, or claims more than `MOST_PIXELS`.
    """
    too_many = f"cannot read {name}: it claims more than {MOST_PIXELS:,} pixels, the limit `MOST_PIXELS`"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # PIL's own limits are others
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise OSError(f"cannot read {name}: it is no image of a known format") from error
    except Image.DecompressionBombError as error:
        raise OSError(too_many) from error
    except Exception as error:  # what decoders raise on damaged bytes has no common type
        raise OSError(f"cannot read {name}: {error}") from error
    if image.width * image.height > MOST_PIXELS:
        raise OSError(too_many)
    if min(image.size) < 1:
        raise OSError(f"cannot read {name}: it has no pixels")
    return image


def decode(content: bytes, name: str) -> UInt8[Tensor, "3 H W"]:
    """A JPEG, PNG, WebP, BMP or TIFF as RGB, upright by its EXIF orientation.

    Grey, palette and CMYK become RGB; 16 bits are scaled to 8; what is transparent shows white, as in a viewer.

    Args:
        content: All bytes of the file.
        name: What to call it in an error.

    Raises:
        OSError: If it is empty, truncated or no image, or claims more than `MOST_PIXELS`.
    """
    # Order matters: no decoder sees what claims too many pixels.
    with open_image(content, name) as file:
        if content.startswith(b"\xff\xd8"):
            try:
                return _decode_jpeg(content)
            except (ImportError, RuntimeError, OSError):
                pass  # PIL reads more of them, and says what is wrong
        try:
            image = _to_rgb(ImageOps.exif_transpose(file))
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # in the order of JPEG decoders
        except Exception as error:  # as in `open_image`
            raise OSError(f"cannot read {name}: {error}") from error


def _decode_jpeg(content: bytes) -> Tensor:
    """Twice as fast as PIL. torchvision announces the decoder's removal: without it, PIL reads JPEGs too."""
    from torchvision.io import ImageReadMode, decode_image

    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)  # a copy: torch wants what it may write to
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision")
        return decode_image(data, ImageReadMode.RGB, apply_exif_orientation=True)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; PIL would cut them off at 255
        return Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def evaluation_view(image: UInt8[Tensor, "3 H W"], size: int) -> UInt8[Tensor, "3 S S"]:
    """The central square: shorter side to `size` * 256 / 224 (below 64 pixels: to `size`), then a centre crop.

    Source: the usual ImageNet evaluation, as in DINO (arXiv 2104.14294).
    """
    shorter = round(size * 256 / 224) if size >= 64 else size
    seen = 4 * min(image.shape[1:])  # the centre crop sees less; a 10,000 x 20 image would grow to 128,000 x 256
    image = F.center_crop(image, [min(side, seen) for side in image.shape[1:]])
    image = F.resize(image, [shorter], InterpolationMode.BICUBIC, antialias=True)
    return F.center_crop(image, [size, size])
