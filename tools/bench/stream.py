"""Images per second of a folder, of LitData's shards and of tars; and of a folder against decoding alone.

Run: python tools/bench/stream.py [--images 5000] [--folder-images 20000] [--workers N] [--rounds 3]
needs: pip install litdata
Protocol: generated JPEGs of 500 x 375 (smooth noise with some grain, quality 90, about 60 kB), DINO's ten crops cut
from each, in batches of 64 in a shuffled order, as `ImageFolderData` gives them to training; one and the same class
reads all three.
The decode bound is what as many processes as the loader has do if they only read, decode and cut the same files,
without handing anything over.
Times: wall time, sides alternate. The formats run whole epochs, loader's start included; folder and decode bound take
turns at stretches of one epoch, without the batches that were ready when a turn began. Files were just written, so they
are read from memory: disks and networks are not measured.
"""

import argparse
import multiprocessing
import os
import tarfile
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import ratio, spread
from torchvision.io import write_jpeg

from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.data.batch import ImageBatch, source_sizes
from ssl_distill.data.image_folder import ImageFolderData
from ssl_distill.data.images import read_image
from ssl_distill.data.optimize import optimize
from ssl_distill.draws import Draws

BATCH, STRETCHES = 64, 8
_PER_TAR = 1000


def write_jpegs(folder: Path, count: int) -> None:
    """Crops of a few generated pictures, each another."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    grain = 0.03 * torch.randn(8, 3, 600, 800, generator=generator)
    smooth = F.interpolate(torch.rand(8, 3, 24, 32, generator=generator), (600, 800), mode="bicubic")
    pictures = (255 * (smooth + grain).clamp(0, 1)).byte()
    for number in range(count):
        top, left = (int(torch.randint(room, (), generator=generator)) for room in (225, 300))
        cut = pictures[number % 8, :, top : top + 375, left : left + 500].contiguous()
        write_jpeg(cut, str(folder / f"{number:06}.jpg"), quality=90)


def write_tars(folder: Path, output: Path) -> None:
    """The same files, a thousand to a tar."""
    output.mkdir()
    files = sorted(folder.iterdir())
    for start in range(0, len(files), _PER_TAR):
        with tarfile.open(output / f"{start // _PER_TAR:05}.tar", "w") as tar:
            for file in files[start : start + _PER_TAR]:
                tar.add(file, file.name)


def data_of(root: Path, workers: int) -> ImageFolderData:
    """The module that training runs, for DINO."""
    data = ImageFolderData(str(root), batch_size=BATCH, num_workers=workers, seed=0)
    data.augment = MultiCropAugment()
    data.setup("fit")
    return data


def epoch(root: Path, workers: int) -> float:
    """Images per second of one epoch of training batches."""
    data = data_of(root, workers)
    start = time.perf_counter()
    seen = sum(len(batch.index) for batch in data.train_dataloader())
    return seen / (time.perf_counter() - start)


def against_decoding(root: Path, workers: int) -> dict[str, list[float]]:
    """Images per second of stretches of one epoch, in turns with processes that only read, decode and cut."""
    data = data_of(root, workers)
    loader = data.train_dataloader()
    batches = iter(loader)
    ahead = (loader.prefetch_factor or 0) * workers  # read while it was the other side's turn: not counted
    length = len(loader) // STRETCHES - ahead
    if length < 4 * ahead:
        raise ValueError(f"`--folder-images` must be at least {5 * ahead * STRETCHES * BATCH} for {workers} workers.")
    files = [str(file) for file in sorted(root.iterdir())]
    rates: dict[str, list[float]] = {"folder": [], "decode bound": []}
    with multiprocessing.get_context("fork").Pool(workers, torch.set_num_threads, (1,)) as pool:
        for stretch in range(STRETCHES):
            for _ in range(ahead):
                next(batches)
            start = time.perf_counter()
            for _ in range(length):
                next(batches)
            rates["folder"].append(length * BATCH / (time.perf_counter() - start))
            start = time.perf_counter()
            mine = files[stretch * length * BATCH :][: length * BATCH]
            pool.map(_decode, [mine[i : i + BATCH] for i in range(0, len(mine), BATCH)], chunksize=1)
            rates["decode bound"].append(length * BATCH / (time.perf_counter() - start))
    return rates


def _decode(files: list[str]) -> None:
    images = [read_image(file) for file in files]
    MultiCropAugment().cut(ImageBatch(images, source_sizes(images), torch.arange(len(files))), Draws(0, 0))


def show(rates: dict[str, list[float]]) -> None:
    """A row per side."""
    print(f"{'images per second':20}{'median':>10}{'min':>10}{'max':>10}")
    for name, values in rates.items():
        print(f"{name:20}{spread(values)}")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="for the three formats")
    parser.add_argument("--folder-images", type=int, default=20_000, help="for the folder against the decode bound")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    workers, rounds = arguments.workers, arguments.rounds
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["SSL_DISTILL_CACHE"] = str(root / "cache")
        write_jpegs(root / "folder", arguments.images)
        print(f"{arguments.images} JPEGs, {workers} workers, n = {rounds}")
        optimize(root / "folder", root / "litdata", num_workers=workers)
        write_tars(root / "folder", root / "tars")
        rates: dict[str, list[float]] = {name: [] for name in ("folder", "litdata", "tars")}
        for _ in range(rounds):
            for side, values in rates.items():
                values.append(epoch(root / side, workers))
        show(rates)
        for name in ("litdata", "tars"):
            print(f"{name} is {ratio(rates[name], rates['folder']):.2f}x as fast as the folder")

        write_jpegs(root / "large", arguments.folder_images)
        print(f"\n{arguments.folder_images} JPEGs, {workers} workers, n = {STRETCHES} stretches of one epoch")
        rates = against_decoding(root / "large", workers)
        show(rates)
        print(f"the folder streams at {ratio(rates['folder'], rates['decode bound']):.2f} of the decode bound")


if __name__ == "__main__":
    main()
