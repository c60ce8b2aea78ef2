"""Fashion-MNIST: 70,000 photographs of garments, 28 x 28 pixels, grey."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision import datasets

from ssl_distill.data.files import read_bytes
from ssl_distill.data.memory import MemoryImages
from ssl_distill.data.module import BatchSet, ImageData, ImageParts
from ssl_distill.draws import Draws

SIZE = 32
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DOWNLOAD_FOLDER = Path("~/.cache/ssl_distill").expanduser()
CLASS_NAMES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


class FashionMNISTData(ImageData):
    """Fashion-MNIST, padded to 32 x 32 pixels, in three equal channels; 60,000 training and 10,000 test images.

    Looked for in `root`, else in the folder of Debian's package dataset-fashion-mnist, else downloaded by torchvision.

    Args:
        root: Folder with the four IDX files, gzipped or not.
        max_shift: Every image is moved by up to this many pixels down or up and left or right, by the same amount
            whenever it is read. Unmoved garments are so well aligned that raw pixels are hard to beat.
        batch_size: Training images per rank.
        num_workers: Loader processes; the images lie in memory, so 0 is fastest.
        eval_batch_size: Images per evaluation batch and rank.
        bank_size: Evaluators learn from the first so many training images.
        query_size: Evaluators predict the first so many test images.
        seed: Of the shifts and the order of training images; None is the run's.

    Source: arXiv 1708.07747.
    """

    num_classes = len(CLASS_NAMES)
    class_names = CLASS_NAMES

    def __init__(
        self,
        root: str | None = None,
        max_shift: int = 0,
        batch_size: int = 128,
        num_workers: int = 0,
        eval_batch_size: int = 500,
        bank_size: int = 10_000,
        query_size: int = 2_000,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, SIZE, SIZE, eval_batch_size, bank_size, query_size, seed)
        if max_shift < 0:
            raise ValueError(f"`max_shift` must be at least 0, got {max_shift}.")
        if root is not None and not Path(root).is_dir():
            raise ValueError(f"`root` must be a folder with Fashion-MNIST's files or be left out, got {root}.")
        self.root = root
        self.max_shift = max_shift

    def prepare_data(self) -> None:
        """Download where needed, on one rank."""
        self._folder()

    def load(self) -> ImageParts:
        """Read both parts into memory."""
        train, test = (self._read(part, stream) for stream, part in enumerate(("train", "t10k")))
        return ImageParts(
            BatchSet(train.image_batch, range(len(train.labels))),
            BatchSet(train.labelled_batch, range(len(train.labels))[: self.bank_size]),
            BatchSet(test.labelled_batch, range(len(test.labels))[: self.query_size]),
        )

    def _folder(self) -> Path:
        folders = [Path(self.root)] if self.root else [DEBIAN_FOLDER, DOWNLOAD_FOLDER / "FashionMNIST" / "raw"]
        for folder in folders:
            if any(folder.glob("t10k-labels-idx1-ubyte*")):
                return folder
        if self.root:
            raise ValueError(
                f"`root` {self.root} must hold t10k-labels-idx1-ubyte[.gz] and Fashion-MNIST's other files."
            )
        try:
            datasets.FashionMNIST(str(DOWNLOAD_FOLDER), download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"Fashion-MNIST is neither in {folders[0]} nor in {folders[1]} and cannot be downloaded ({error});"
                " run `apt-get install dataset-fashion-mnist` or set `root`."
            ) from error
        return folders[-1]

    def _read(self, part: str, stream: int) -> MemoryImages:
        folder = self._folder()
        images = _read_idx(folder / f"{part}-images-idx3-ubyte")
        labels = _read_idx(folder / f"{part}-labels-idx1-ubyte")
        if images.ndim != 3 or not min(images.shape) >= 1 or max(images.shape[1:]) > SIZE:
            raise ValueError(
                f"{folder}/{part}-images-idx3-ubyte[.gz] must hold images of at most {SIZE} x {SIZE} pixels, got shape"
                f" {tuple(images.shape)}."
            )
        if labels.shape != images.shape[:1] or labels.max() >= len(CLASS_NAMES):
            raise ValueError(
                f"{folder}/{part}-labels-idx1-ubyte[.gz] must hold a class from 0 to {len(CLASS_NAMES) - 1} for each of"
                f" {len(images)} images, got shape {tuple(labels.shape)} with classes up to {labels.max()}."
            )
        index = torch.arange(len(images))
        shift = Draws(self.seed, 0).uniform(index, stream, 2) * (2 * self.max_shift + 1)
        return MemoryImages(_place(images, shift.long() - self.max_shift)[:, None], labels.long())


def _place(images: UInt8[Tensor, "N H W"], shift: Tensor) -> UInt8[Tensor, "N S S"]:
    """Images in the middle of a square of `SIZE` pixels, moved by `shift` (N, 2) pixels down and right."""
    count, height, width = images.shape
    margin = int(shift.abs().max())
    canvas = images.new_zeros(count, SIZE + 2 * margin, SIZE + 2 * margin)
    rows = margin + (SIZE - height) // 2 + shift[:, :1] + torch.arange(height)
    columns = margin + (SIZE - width) // 2 + shift[:, 1:] + torch.arange(width)
    canvas[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]] = images
    return canvas[:, margin : margin + SIZE, margin : margin + SIZE].contiguous()


def _read_idx(path: Path) -> UInt8[Tensor, "..."]:
    """Bytes in the IDX format, gzipped or not: 0, 0, type (8: bytes), dimensions, their sizes, data."""
    packed = path.with_name(f"{path.name}.gz")
    try:
        data = gzip.decompress(read_bytes(packed)) if packed.exists() else read_bytes(path)
        if data[:3] != b"\0\0\x08":
            raise ValueError(f"it begins with {data[:3]!r}, not with 0, 0, 8 as bytes in that format do")
        shape = np.frombuffer(data, ">u4", count=data[3], offset=4).tolist()
        if len(data) != 4 + 4 * len(shape) + math.prod(shape):
            raise ValueError(f"it has {len(data)} bytes, which does not fit its shape {shape}")
        return torch.frombuffer(bytearray(data[4 + 4 * len(shape) :]), dtype=torch.uint8).view(shape)
    except (OSError, EOFError, ValueError, IndexError, RuntimeError, zlib.error) as error:
        raise ValueError(f"cannot read {path}[.gz] as an IDX file: {error}.") from error
