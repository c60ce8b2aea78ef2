"""Where images lie: in files, in tar shards, in LitData's shards. Each is read by position, in any order."""

import csv
import hashlib
import importlib
import json
import os
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ssl_distill.cache import cache_folder
from ssl_distill.callbacks.atomic import replacing
from ssl_distill.data.files import check_regular, read_bytes, read_json
from ssl_distill.data.images import SUFFIXES
from ssl_distill.data.names import escaped

_FORMATS = (
    r"bytes|str|int|float|bool|tensor|numpy|no_header_(tensor|numpy):\d+"  # of LitData; others decode or unpickle
)
_TAR_INDEX = 2  # what is remembered of a tar; another number reads all tars again
TABLE = "images.csv"  # beside LitData's shards: path and label of every item, which the shards tell only one by one


class FoundImage(NamedTuple):
    """One image of a source.

    Attributes:
        position: In its source.
        label: Name of its class, if it has one.
        inner_path: Its path inside the root.
    """

    position: int
    label: str | None
    inner_path: str


class ImageSource(ABC):
    """Encoded images by position. Copies of it in loader processes open what they read themselves."""

    @abstractmethod
    def read(self, position: int) -> bytes:
        """The bytes of one image file.

        Raises:
            OSError: If they cannot be read.
        """

    @abstractmethod
    def where(self, position: int) -> str:
        """The place, for messages: one line."""

    @abstractmethod
    def file(self, position: int) -> str:
        """The file that holds it, whose size and time tell whether it was replaced."""

    def check(self, position: int) -> None:  # noqa: B027  # most sources know only when they read
        """Find out whether there is anything to read, without reading it.

        Raises:
            OSError: If not.
        """


class FileSource(ImageSource):
    """Files of their own."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def read(self, position: int) -> bytes:
        """The file's bytes."""
        return read_bytes(self.paths[position])

    def where(self, position: int) -> str:
        """The file."""
        return escaped(self.paths[position])

    def file(self, position: int) -> str:
        """The file."""
        return self.paths[position]

    def check(self, position: int) -> None:
        """Refuse what is no file: FIFOs, devices, links that lead nowhere."""
        check_regular(self.paths[position])


class TarMember(NamedTuple):
    """An image inside a tar.

    Attributes:
        shard: Number of the tar.
        offset: Where its bytes begin.
        num_bytes: How many there are.
    """

    shard: int
    offset: int
    num_bytes: int


class TarSource(ImageSource):
    """Images in uncompressed tars, as WebDataset has them.

    A tar is read through once; where its images lie is remembered in the user's cache, so that a start costs nothing.
    """

    def __init__(self, shards: Sequence[Path], names: Sequence[str], members: Sequence[TarMember]) -> None:
        self.shards = shards
        self.names = names
        self.members = members
        self._opened: dict[tuple[int, int], int] = {}  # by process and shard: positions in a file are not shared

    def read(self, position: int) -> bytes:
        """The member's bytes."""
        member = self.members[position]
        key = (os.getpid(), member.shard)
        if key not in self._opened:
            self._opened[key] = os.open(self.shards[member.shard], os.O_RDONLY)
        return os.pread(self._opened[key], member.num_bytes, member.offset)

    def file(self, position: int) -> str:
        """The tar."""
        return str(self.shards[self.members[position].shard])

    def where(self, position: int) -> str:
        """Tar and member."""
        return escaped(f"{self.shards[self.members[position].shard]}:{self.names[position]}")


class LitDataItems:
    """Items of a folder of LitData's shards, by position; each is a dict."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._dataset: tuple[int, Any] = (-1, None)  # process and reader: its open files and threads are not shared

    def __getitem__(self, position: int) -> dict[str, Any]:
        process, dataset = self._dataset
        if process != os.getpid():
            dataset = open_litdata(self.root)
            self._dataset = (os.getpid(), dataset)
        try:
            item: dict[str, Any] = dataset[position]
        except Exception as error:  # what LitData raises on damaged bytes has no common type
            raise OSError(f"cannot read item {position} of {self.root}: {type(error).__name__} {error}") from error
        return item

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": (-1, None)}


class LitDataSource(ImageSource):
    """Shards that `ssl-distill data optimize` made: the format of Lightning's LitData, whose items are dicts."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.names = names
        self.items = LitDataItems(root)

    def read(self, position: int) -> bytes:
        """Field `image` of an item."""
        item = self.items[position]
        image = item.get("image") if isinstance(item, dict) else None
        if not isinstance(image, (bytes, memoryview)):
            raise OSError(f"cannot read {self.where(position)}: its item holds no bytes `image`")
        return bytes(image)

    def file(self, position: int) -> str:
        """The index of the shards, which is made last."""
        return str(self.root / "index.json")

    def where(self, position: int) -> str:
        """Folder and item."""
        return escaped(f"{self.root}:{self.names[position]}")


def open_litdata(root: Path) -> Any:
    """LitData's reader of a folder of shards.

    Raises:
        ValueError: As in `read_index`, or if LitData is not installed or cannot read them.
    """
    read_index(root)
    reader = import_litdata("litdata").StreamingDataset
    try:
        # Its windows are for reading in order: of 256 decoded items, a random order would use one.
        return reader(str(root), shuffle=False, batch_decode=0)
    except Exception as error:  # as on damaged bytes
        raise ValueError(f"{root} holds no shards that LitData can read: {type(error).__name__} {error}.") from error


def import_litdata(module: str) -> Any:
    """A module of LitData.

    Raises:
        ValueError: If LitData is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError("shards need LitData; run `pip install 'ssl-distill[stream]'`.") from error


def shards_in(root: Path) -> list[Path]:
    """The tars that a path means: itself, or those directly in it; none if it means something else."""
    if root.is_file():
        return [root] if root.suffix.lower() == ".tar" else []
    return sorted(root.glob("*.tar"))


def is_litdata(root: Path) -> bool:
    """Whether a folder holds shards of LitData."""
    return (root / "index.json").is_file()


def check_shards(root: Path) -> None:
    """Refuse a folder of LitData's shards that is not whole.

    Raises:
        ValueError: As in `read_index`, or if LitData is not installed, or a shard is missing or of another size than it
            was written with.
        OSError: If the index cannot be read.
    """
    index = root / "index.json"
    chunks = read_index(root)["chunks"]
    if not chunks:
        raise ValueError(f"{index} must list `chunks`; copy or make the shards again.")
    for number, chunk in enumerate(chunks):
        kinds = {"chunk_bytes": int, "chunk_size": int}
        if any(type(chunk.get(key)) is not kind for key, kind in kinds.items()):
            raise ValueError(f"{index}: entry {number} of `chunks` must have {', '.join(kinds)}, got {chunk}.")
        file = root / chunk["filename"]
        try:
            size = check_regular(file)
        except OSError as error:
            raise ValueError(f"{index} names a shard that cannot be read: {error}; copy the shards again.") from error
        if size != chunk["chunk_bytes"]:
            raise ValueError(
                f"{file} has {size} bytes, {index.name} says {chunk['chunk_bytes']}; copy or make the shards again."
            )
    import_litdata("litdata")


def count_items(root: Path) -> int:
    """How many items a folder of LitData's shards holds.

    Raises:
        ValueError: As in `read_index`.
    """
    return sum(chunk["chunk_size"] for chunk in read_index(root)["chunks"])


def read_index(root: Path) -> dict[str, Any]:
    """What LitData will go by; it obeys more than shards of images and frames need.

    Raises:
        ValueError: If it is no index, items are anything but dicts of bytes, text, numbers and arrays, or shards lie
            outside of the folder: LitData would unpickle, or import what the index names.
    """
    file = root / "index.json"
    try:
        index: dict[str, Any] = read_json(file)
        formats, names = index["config"]["data_format"], [chunk["filename"] for chunk in index["chunks"]]
        _, items = json.loads(index["config"]["data_spec"])
        keys = json.loads(items["context"])
        leaves: list[Any] = [{"type": None, "context": None, "children_spec": []}] * len(formats)
        is_plain = items["type"] == "builtins.dict" and all(isinstance(key, str) for key in keys)
        is_plain = is_plain and items["children_spec"] == leaves
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no index of LitData's shards ({type(error).__name__}: {error}).") from error
    unknown = [name for name in formats if not re.fullmatch(_FORMATS, str(name))]
    if unknown:
        raise ValueError(
            f"{file} names items of format {unknown[0]}, which are not read because they might run code; known are"
            " bytes, str, int, float, bool, tensor and numpy. Make the shards again with `ssl-distill data optimize`."
        )
    if not is_plain:
        raise ValueError(f"{file} describes items that are not plain dicts, whose classes would be imported.")
    outside = [name for name in names if not isinstance(name, str) or name in ("", "..") or Path(name).name != name]
    if outside:
        raise ValueError(f"{file} names the shard {outside[0]}, which is outside of the folder.")
    return index


def open_packed(root: Path) -> tuple[TarSource | LitDataSource, list[FoundImage]] | None:
    """All images in LitData's shards or in tars; None if a path means neither.

    Raises:
        ValueError: If they cannot be read, or are of something else.
    """
    if is_litdata(root):
        return open_shards(root)
    if tars := shards_in(root):
        return open_tars(tars)
    return None


def open_tars(shards: Sequence[Path]) -> tuple[TarSource, list[FoundImage]]:
    """All images in tars. The label is what `KEY.cls` beside `KEY.jpg` says, or else the folder inside the tar.

    Raises:
        ValueError: If a tar is damaged, cut off or compressed.
        OSError: If it cannot be read, or is no file.
    """
    names: list[str] = []
    members: list[TarMember] = []
    found: list[FoundImage] = []
    for number, shard in enumerate(shards):
        for name, label, offset, num_bytes in _tar_index(shard):
            found.append(FoundImage(len(found), label, f"{shard.name}/{name}"))
            names.append(name)
            members.append(TarMember(number, offset, num_bytes))
    return TarSource(shards, names, members), found


def open_shards(root: Path) -> tuple[LitDataSource, list[FoundImage]]:
    """All images of a folder of LitData's shards.

    Raises:
        ValueError: If other tools made them, or they are not complete.
        OSError: If they cannot be read.
    """
    if not (root / TABLE).is_file():
        raise ValueError(
            f"{root} holds shards without {TABLE}, so not of images; make them with `ssl-distill data optimize`."
        )
    check_shards(root)
    with (root / TABLE).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        try:
            heading, *cells = csv.reader(file, strict=True)
            rows = [(path, label) for path, label in cells]
        except (csv.Error, ValueError) as error:
            raise ValueError(
                f"{root / TABLE} must be rows of path and label ({error}); make the shards again."
            ) from error
        if heading != ["path", "label"]:
            raise ValueError(f"{root / TABLE} must begin with path,label, got {heading}; make the shards again.")
    count = count_items(root)
    if count != len(rows):
        raise ValueError(f"{root} holds {count} items, its {TABLE} {len(rows)}; make the shards again.")
    found = [FoundImage(position, label or None, path) for position, (path, label) in enumerate(rows)]
    return LitDataSource(root, [path for path, _ in rows]), found


def _tar_index(shard: Path) -> list[tuple[str, str | None, int, int]]:
    """Name, label, offset and size of every image in a tar; from the user's cache if the tar is as it was."""
    check_regular(shard)
    status = shard.stat()
    key = f"{_TAR_INDEX} {shard.resolve()} {status.st_size} {status.st_mtime_ns}"
    file = cache_folder() / "tar" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:24]}.json"
    if file.is_file():
        try:
            return [(name, label, int(offset), int(size)) for name, label, offset, size in read_json(file)]
        except (OSError, ValueError, TypeError):
            pass  # damaged: the tar itself tells
    try:
        rows = list(_tar_rows(shard))
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{shard} is no uncompressed tar, or is damaged or cut off ({error}).") from error
    try:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(rows), encoding="utf-8")
    except OSError:
        pass  # a cache that cannot be written costs time at the next start, no more
    return rows


def _tar_rows(shard: Path) -> Iterator[tuple[str, str | None, int, int]]:
    classes: dict[str, str] = {}
    places: dict[str, tuple[int, int]] = {}
    no_files: list[str] = []
    images: list[tuple[str, int, int]] = []
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            if member.size < 0 or tar.offset <= member.offset:  # would be read again and again
                raise ValueError(f"the size of {escaped(member.name)} is {member.size}")
            key, _, suffix = member.name.partition(".")
            if member.isfile():
                places[member.name] = (member.offset_data, member.size)
            if member.isfile() and suffix.lower() == "cls" and (content := tar.extractfile(member)):
                classes[key] = content.read().decode(errors="surrogateescape").strip()
            elif member.name.lower().endswith(SUFFIXES) and not member.isdir():
                # A hard link is the name of a member before it.
                if place := places.get(member.linkname if member.islnk() else member.name):
                    images.append((member.name, *place))
                else:
                    no_files.append(member.name)
        _check_end(shard, tar.offset)
    if no_files:
        rank_zero_warn(
            f"{len(no_files)} of {len(no_files) + len(images)} images in {escaped(str(shard))} are links or other than"
            f" files, such as {escaped(no_files[0])}: left out."
        )
    for name, offset, num_bytes in images:
        folder = name.rpartition("/")[0].removeprefix("./").partition("/")[0]
        yield name, classes.get(name.partition(".")[0], folder or None), offset, num_bytes


def _check_end(shard: Path, offset: int) -> None:
    """Refuse an archive that goes on where its members end, or just stops there: the reader is silent about both.

    Raises:
        ValueError: If anything but zeros, two blocks of them at least, follows.
    """
    zeros = 0
    with shard.open("rb") as file:
        file.seek(offset)
        while part := file.read(2**20):
            if part.count(0) < len(part):
                raise ValueError(f"the header at byte {offset} is damaged, or what follows is another archive")
            zeros += len(part)
    if zeros < 2 * tarfile.BLOCKSIZE:
        raise ValueError(f"it stops at byte {offset} without the two empty blocks of an end")
