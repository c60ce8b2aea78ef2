"""What has changed about the files that a run trains on, since it was stopped."""

import os
import zlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from ssl_distill.data.names import escaped

_MOST_LOOKED_AT = 100_000  # sizes and times cost a request each, which on network disks is what a start waits for


def fingerprint(names: Sequence[str], files: Sequence[str]) -> Int[Tensor, "files"]:
    """A number per file: a checksum of its name, and in the lower half one of its size and time.

    Of more than 100,000 files all names count, and sizes and times of about so many.

    Args:
        names: The same wherever the data lie.
        files: Where each is; several may be in one.
    """
    checksums = [zlib.crc32(name.encode(errors="surrogateescape")) for name in names]
    apart = -(-len(set(files)) // _MOST_LOOKED_AT)
    stamps: dict[str, int] = {}
    numbers = []
    for checksum, file in zip(checksums, files, strict=True):
        if checksum % apart == 0 and file not in stamps:
            stamps[file] = _stamp(file)
        numbers.append((checksum << 32 | stamps.get(file, 0)) - (1 << 63))
    return torch.tensor(numbers, dtype=torch.int64)


def changes(before: Int[Tensor, "_"], now: Int[Tensor, "files"], names: Sequence[str]) -> str:
    """What was added, removed and replaced, in words; empty if nothing was.

    Args:
        before: The fingerprint then.
        now: The fingerprint of `names`.
        names: Of the files.
    """
    old, new = (dict(zip(*_halves(each), strict=True)) for each in (before, now))
    name_of = dict(zip(_halves(now)[0], names, strict=True))
    added = [name_of[key] for key in new if key not in old]
    replaced = [name_of[key] for key, stamp in new.items() if stamp and old.get(key) and old[key] != stamp]
    removed = sum(key not in new for key in old)
    return "; ".join([
        *_told(added, "added"),
        *([f"{removed:,} removed"] if removed else []),
        *_told(replaced, "replaced (another size or time)"),
    ])  # fmt: skip


def _halves(numbers: Tensor) -> tuple[list[int], list[int]]:
    """Checksums of names, and stamps."""
    return (numbers >> 32).tolist(), (numbers & 0xFFFFFFFF).tolist()


def _told(names: Sequence[str], what: str) -> Iterator[str]:
    if names:
        yield f"{len(names):,} {what}, such as {escaped(names[0])}"


def _stamp(file: str) -> int:
    """Of a file's size and time in seconds, which copies keep on most disks; 0 if it cannot be looked at."""
    try:
        status = os.stat(file)
    except OSError:
        return 0
    return zlib.crc32(f"{status.st_size} {int(status.st_mtime)}".encode()) or 1
