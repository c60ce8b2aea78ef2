"""Which images a folder, a list or shards hold, and their classes."""

import heapq
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from ssl_distill.data.files import check_regular
from ssl_distill.data.images import SUFFIXES
from ssl_distill.data.names import escaped
from ssl_distill.data.quarantine import read_quarantine
from ssl_distill.data.sources import FileSource, FoundImage, ImageSource, open_packed

Labels = Literal["auto", "folder", "none"]

_PARTS = {"train", "training", "val", "valid", "validation", "test"}  # folders so called are no classes
_LIST_ROW = re.compile(
    rf'"?(?P<path>.+?({"|".join(map(re.escape, SUFFIXES))}))"?\s*([,;\t ]\s*"?(?P<label>[^,;\t"]*).*)?', re.IGNORECASE
)


def check_root(argument: str, root: str) -> Path:
    """The path of a folder, a list or a tar.

    Raises:
        ValueError: If it is none of them.
    """
    path = Path(root).expanduser()
    rule = f"`{argument}` must be a folder of images or of shards, a .tar, or a .txt or .csv list"
    if not root:
        raise ValueError(f"{rule}, got an empty path.")
    if not path.exists():
        raise ValueError(f"{rule}, {root} does not exist.")
    if path.is_file() and path.suffix.lower() not in (".txt", ".csv", ".tar"):
        raise ValueError(f"{rule}, got the file {root}.")
    return path


def list_images(argument: str, root: Path) -> tuple[ImageSource, list[FoundImage]]:
    """All images, those in quarantine too.

    The label is the folder directly in `root`, the list's second column, or what shards say.

    Raises:
        ValueError: If there are none, or a folder, a row or a shard cannot be read.
    """
    source: ImageSource
    if packed := open_packed(root):
        source, found = packed
    else:
        rows = list(_in_list(root) if root.is_file() else _in_folder(root))
        source = FileSource([path for path, _, _ in rows])
        found = [FoundImage(position, label, name) for position, (_, label, name) in enumerate(rows)]
    if not found:
        raise ValueError(f"`{argument}` {root} holds no images; looked in all its folders for {', '.join(SUFFIXES)}.")
    return source, found


def find_images(argument: str, root: Path, labels: Labels) -> tuple[ImageSource, list[FoundImage]]:
    """All images that are not in quarantine, with their classes, or with none at all.

    Raises:
        ValueError: If there are none, or they are not in classes as `labels` wants it.
    """
    source, found = list_images(argument, root)
    reasons, list_of_them = read_quarantine(root)
    kept = [file for file in found if file.inner_path not in reasons]
    if not kept:
        raise ValueError(f"`{argument}` {root} holds {len(found)} images, all of which {list_of_them} leaves out.")
    if len(kept) < len(found):
        rank_zero_info(f"{len(found) - len(kept)} of {len(found)} images in {root} left out by {list_of_them}")
    return source, with_classes(kept, argument, root, labels)


def with_classes(found: list[FoundImage], argument: str, root: Path, labels: Labels) -> list[FoundImage]:
    """The images with their classes, or without labels where those are no classes.

    Raises:
        ValueError: If `labels` is "folder" and an image lies in no class.
    """
    names = {file.label for file in found}
    if labels == "folder" and None in names:
        stray = next(file.inner_path for file in found if file.label is None)
        raise ValueError(f"`labels` folder needs every image in a class, {root}/{stray} is in none; use auto or none.")
    if labels == "auto" and names <= _PARTS:
        rank_zero_warn(
            f"`{argument}` {root} holds {', '.join(sorted(map(str, names)))}, which are no classes; set `root` and"
            " `val_root` to the folders with the classes."
        )
        names = {None}
    if labels == "none" or None in names or (labels == "auto" and len(names) < 2):
        return [file._replace(label=None) for file in found]
    return found


def in_class_order(names: set[str]) -> tuple[str, ...]:
    """Names of classes in the order of their labels: numbers by value, words by the alphabet."""
    return tuple(sorted(names, key=lambda name: (int(name) if name.isdecimal() else -1, name)))


_Row = tuple[str, str | None, str]
"""Path, label, and path inside the root."""


def _in_folder(root: Path) -> Iterator[_Row]:
    """Images in all folders, hidden ones left out, in the order of their paths."""
    for inner, names in sorted(_names_by_folder(root).items()):
        for name in sorted(names):
            yield os.path.join(root, *inner, name), inner[0] if inner else None, "/".join((*inner, name))


def _names_by_folder(root: Path) -> dict[tuple[str, ...], list[str]]:
    """Names of images by the parts of their folder's path in `root`, of every real folder once.

    Links to folders are followed after all others, the highest first, so that a folder that a link leads to as well
    keeps its own path, and a link that leads back to where it lies adds nothing.
    """
    names: dict[tuple[str, ...], list[str]] = {}
    seen: set[tuple[int, int]] = set()
    again: list[tuple[str, ...]] = []
    folders: list[tuple[str, ...]] = [()]
    links: list[tuple[int, tuple[str, ...]]] = []  # a heap, by their depth
    while folders or links:
        inner = folders.pop() if folders else heapq.heappop(links)[1]
        try:
            status = os.stat(root.joinpath(*inner))
            if (status.st_dev, status.st_ino) in seen:
                again.append(inner)
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root.joinpath(*inner)) as entries:
                found = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise ValueError(f"cannot read the folder {escaped(str(error.filename))}: {error.strerror}.") from error
        for entry in found:
            if not _is_folder(entry):
                if entry.name.lower().endswith(SUFFIXES):
                    names.setdefault(inner, []).append(entry.name)
            elif entry.is_symlink():
                heapq.heappush(links, (len(inner), (*inner, entry.name)))
            else:
                folders.append((*inner, entry.name))
    if again:
        rank_zero_warn(
            f"{len(again)} links in {escaped(str(root))} lead to folders that are read already, such as"
            f" {escaped('/'.join(min(again)))}: left out."
        )
    return names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, which reading names
        return False


def _in_list(file: Path) -> Iterator[_Row]:
    """Rows of a list; the first may be a heading."""
    check_regular(file)
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as rows:
        for number, row in enumerate(rows):
            match = _LIST_ROW.fullmatch(row.strip())
            if match:
                yield str(file.parent / match["path"]), match["label"] or None, match["path"]
            elif row.strip() and number > 0:
                raise ValueError(f"{file} line {number + 1} must be an image path and, if known, a label, got {row!r}.")
