"""Images, or any other items, as shards of LitData: few large files instead of many small ones."""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch.utils.data import DataLoader

from ssl_distill.callbacks.atomic import replacing
from ssl_distill.data.corrupt import Replacement
from ssl_distill.data.image_paths import find_images
from ssl_distill.data.names import escaped
from ssl_distill.data.sources import TABLE, FoundImage, ImageSource, import_litdata

_UNDER_WAY = ".under_way"  # folder of what is done, until all is
_MOST_BYTES = 2**32 - 2**20  # of a shard: LitData counts them in 32 bits

Item = dict[str, bytes | str]


@runtime_checkable
class Items(Protocol):
    """What is written: dicts with the same keys, each made when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> Item: ...


class Table(NamedTuple):
    """What is said of all items, in a file beside the shards.

    Attributes:
        name: Of the file; it tells what kind of items they are.
        content: Of the file.
    """

    name: str
    content: bytes


def optimize(root: Path, output: Path, images_per_shard: int = 1000, num_workers: int = 0) -> int:
    """Write the images that `root` holds, as they are, and a table of their paths and labels.

    Args:
        root: As in `ImageFolderData`; what is in quarantine is left out.
        output: As in `write_shards`.
        images_per_shard: As in `write_shards`.
        num_workers: As in `write_shards`.

    Returns:
        How many images there are.

    Raises:
        ValueError: If there are none; else as in `write_shards`.
        OSError: If an image cannot be read. Names that are no files, such as links that lead nowhere, are left out; it
            is an error if they are more than 10 and 1 %.
    """
    source, found = find_images("DIR", root, "auto")
    found = _there(source, found)
    rows = io.StringIO(newline="")
    writer = csv.writer(rows)
    writer.writerow(("path", "label"))
    writer.writerows((image.inner_path, image.label or "") for image in found)
    table = Table(TABLE, rows.getvalue().encode(errors="surrogateescape"))
    items = _ImageItems(source, found)
    write_shards(items, table, os.fsencode(root.resolve()), output, images_per_shard, num_workers)
    return len(found)


def _there(source: ImageSource, found: Sequence[FoundImage]) -> list[FoundImage]:
    """Images that are files; the others are named and counted."""
    replacement = Replacement(len(found), "skip")
    there = []
    for number, image in enumerate(found):
        try:
            source.check(image.position)
            there.append(image)
        except OSError as error:
            replacement.note(number, error)
    if not there:
        raise OSError(f"none of {len(found)} images is a file, such as {source.where(found[0].position)}")
    return there


class _ImageItems:
    """Images as a source has them, with what the table says of them."""

    def __init__(self, source: ImageSource, found: Sequence[FoundImage]) -> None:
        self.source = source
        self.found = found

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, position: int) -> Item:
        image = self.found[position]
        said = {"path": escaped(image.inner_path), "label": escaped(image.label or "")}
        return {"image": self.source.read(image.position), **said}


def write_shards(
    items: Items, table: Table, identity: bytes, output: Path, items_per_shard: int, num_workers: int
) -> None:
    """Write all items, with a progress bar.

    A shard is there whole or not at all. Called again after an interruption, it writes those that are missing.

    Args:
        items: What is written.
        table: Written at the end.
        identity: What tells these items from others of the same table: shards of others are not gone on with.
        output: Folder of the shards.
        items_per_shard: Items in a shard.
        num_workers: Processes that write.

    Raises:
        ValueError: If `output` holds something else, or shards of other items; or a shard would be too large.
        OSError: If an item cannot be read.
    """
    digest = hashlib.sha256(f"{items_per_shard} {table.name} {len(table.content)} ".encode())
    digest.update(table.content + identity)
    plan = digest.hexdigest()
    if (output / "index.json").exists():
        raise ValueError(f"`OUT` {output} holds shards already; remove them to make them again.")
    under_way = output / _UNDER_WAY
    if output.exists() and any(output.iterdir()) and not under_way.exists():
        raise ValueError(f"`OUT` must be a new or empty folder, {output} holds other files.")
    import_litdata("litdata")  # asked for once everything else is right, and before anything is written
    under_way.mkdir(parents=True, exist_ok=True)
    plan_file = under_way / "plan.txt"
    if plan_file.exists() and plan_file.read_text() != plan:
        raise ValueError(f"`OUT` {output} holds shards of other data or of another size; remove it to begin again.")
    if not plan_file.exists():
        with replacing(plan_file) as temporary:
            temporary.write_text(plan)

    entries = [*_written(_Shards(items, items_per_shard, output), num_workers)]
    with replacing(output / table.name) as temporary:
        temporary.write_bytes(table.content)
    with replacing(output / "index.json") as temporary:
        temporary.write_text(json.dumps({"chunks": [e["chunk"] for e in entries], "config": entries[0]["config"]}))
    shutil.rmtree(under_way)


class _Shards:
    """A data set whose items are written when they are asked for; each is what the index says of the shard."""

    def __init__(self, items: Items, items_per_shard: int, output: Path) -> None:
        self.items = items
        self.items_per_shard = items_per_shard
        self.output = output

    def __len__(self) -> int:
        return -(-len(self.items) // self.items_per_shard)

    def __getitem__(self, number: int) -> dict[str, Any] | Exception:
        try:
            return self._entry(number)
        except (OSError, ValueError) as error:
            return error  # raised in a loader process, it would come out with a traceback in its text

    def _entry(self, number: int) -> dict[str, Any]:
        record = self.output / _UNDER_WAY / f"{number}.json"
        if record.exists():
            entry: dict[str, Any] = json.loads(record.read_text())
            return entry
        folder = self.output / _UNDER_WAY / f"shard-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        self._write(number, folder)
        index = json.loads(next(folder.glob("*index.json")).read_text())
        (chunk,) = index["chunks"]
        entry = {"chunk": chunk, "config": index["config"]}
        # Order matters: the shard is in its place before the record says so.
        (folder / chunk["filename"]).replace(self.output / chunk["filename"])
        with replacing(record) as temporary:
            temporary.write_text(json.dumps(entry))
        shutil.rmtree(folder)
        return entry

    def _write(self, number: int, folder: Path) -> None:
        binary_writer = import_litdata("litdata.streaming.writer").BinaryWriter
        # Order matters: LitData asks its formats in turn, and some take text that happens to be the name of a file, or
        # bytes that look like a PDF. All is bytes here, and asked first.
        formats = {"bytes": import_litdata("litdata.streaming.serializers").BytesSerializer()}
        writer = binary_writer(str(folder), chunk_size=self.items_per_shard, chunk_index=number, serializers=formats)
        start = number * self.items_per_shard
        num_bytes = 0
        for i, position in enumerate(range(start, min(start + self.items_per_shard, len(self.items)))):
            item = {key: _as_bytes(value) for key, value in self.items[position].items()}
            num_bytes += sum(map(len, item.values()))
            if num_bytes > _MOST_BYTES:
                raise ValueError(
                    f"`--items-per-shard` must be at most {max(i, 1)}, got {self.items_per_shard}: a shard holds less"
                    " than 4 GiB."
                )
            writer.add_item(i, item)
        writer.done()


def _written(shards: Any, num_workers: int) -> Iterator[dict[str, Any]]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    loader = DataLoader(shards, batch_size=None, num_workers=num_workers, collate_fn=_as_is)
    for entry in tqdm(loader, "writing", unit=" shards"):
        if isinstance(entry, Exception):
            raise entry
        yield entry


def _as_bytes(value: bytes | str) -> bytes:
    return value.encode(errors="surrogateescape") if isinstance(value, str) else value


def _as_is(entry: Any) -> Any:
    return entry
