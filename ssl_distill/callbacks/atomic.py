"""Files that are either whole or as they were before."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STALE_SECONDS = 3600  # a file that is being written has just been written to


@contextmanager
def replacing(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """A temporary file in the same folder that takes the place of `path` once it is written and on the disk.

    After an error, a full disk or a kill, `path` is what it was before. The file has the mode that the umask gives. Its
    temporary name cannot be guessed, and it is made where nothing was before: no link that somebody put there is
    followed. What a kill leaves behind is removed when the same file is written again, an hour later or more.

    Args:
        path: The file; one that is a link is replaced, not followed.
        durable: Whether to wait for the disk. Without, a power cut may leave a torn file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    mode = os.fstat(descriptor).st_mode & 0o777
    os.close(descriptor)
    try:
        remove_stale(path, temporary)
        yield temporary
        descriptor = os.open(temporary, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        try:
            if hasattr(os, "fchmod"):  # safetensors puts a file of its own there, which only its owner may read
                os.fchmod(descriptor, mode)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def beside(path: Path, kind: str = "writing") -> Path:
    """A hidden name in the same folder that nobody can guess; writers know the format by its suffix, the same."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(8)}.{kind}{path.suffix}")


def remove_stale(path: Path, newest: Path) -> None:
    """Remove what killed processes left of earlier writes of `path`.

    Args:
        path: What was to be written, a file or a folder.
        newest: What has just been made beside it; its time is that of the file system's own clock.
    """
    now = newest.stat().st_mtime
    # A folder that was put aside is the only whole one until the new one has its name.
    kinds = [f".{kind}{path.suffix}" for kind in (("writing", "old") if path.exists() else ("writing",))]
    for entry in os.scandir(path.parent):
        if entry.name.startswith(f".{path.stem}.") and entry.name.endswith(tuple(kinds)):
            left = Path(entry.path)
            try:
                if now - max(each.lstat().st_mtime for each in (left, *left.glob("*"))) < _STALE_SECONDS:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(left)
                else:
                    left.unlink()
            except OSError:
                continue  # its writer has just finished, or it is another user's
