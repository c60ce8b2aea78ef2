"""A folder of images as shards of LitData: few large files instead of many small ones."""

import csv
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from ssl_distill.callbacks.atomic import replacing
from ssl_distill.data.image_paths import find_images
from ssl_distill.data.sources import TABLE, FoundImage, ImageSource, import_litdata

_UNDER_WAY = ".under_way"  # folder of what is done, until all is


def optimize(root: Path, output: Path, images_per_shard: int = 1000, num_workers: int = 0) -> int:
    """Write the images that `root` holds, as they are, and a table of their paths and labels.

    A shard is there whole or not at all. Called again after an interruption, it writes those that are missing.

    Args:
        root: As in `ImageFolderData`; what is in quarantine is left out.
        output: Folder of the shards.
        images_per_shard: Items in a shard.
        num_workers: Processes that write.

    Returns:
        How many images there are.

    Raises:
        ValueError: If `output` holds something else, or shards of other images.
    """
    source, found = find_images("DIR", root, "auto")
    plan = _plan_of(root, found, images_per_shard)
    if (output / "index.json").exists():
        raise ValueError(f"`OUT` {output} holds shards already; remove them to make them again.")
    under_way = output / _UNDER_WAY
    if output.exists() and any(output.iterdir()) and not under_way.exists():
        raise ValueError(f"`OUT` must be a new or empty folder, {output} holds other files.")
    import_litdata("litdata")  # asked for once everything else is right, and before anything is written
    under_way.mkdir(parents=True, exist_ok=True)
    plan_file = under_way / "plan.txt"
    if plan_file.exists() and plan_file.read_text() != plan:
        raise ValueError(f"`OUT` {output} holds shards of other images or another size; remove it to begin again.")
    if not plan_file.exists():
        with replacing(plan_file) as temporary:
            temporary.write_text(plan)

    shards = _Shards(source, found, images_per_shard, output)
    entries = [*_written(shards, num_workers)]
    with replacing(output / TABLE) as temporary, temporary.open("w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label"))
        writer.writerows((image.inner_path, image.label or "") for image in found)
    with replacing(output / "index.json") as temporary:
        temporary.write_text(json.dumps({"chunks": [e["chunk"] for e in entries], "config": entries[0]["config"]}))
    shutil.rmtree(under_way)
    return len(found)


class _Shards:
    """A data set whose items are written when they are asked for; each is what the index says of the shard."""

    def __init__(self, source: ImageSource, found: Sequence[FoundImage], images_per_shard: int, output: Path) -> None:
        self.source = source
        self.found = found
        self.images_per_shard = images_per_shard
        self.output = output

    def __len__(self) -> int:
        return -(-len(self.found) // self.images_per_shard)

    def __getitem__(self, number: int) -> dict[str, Any]:
        record = self.output / _UNDER_WAY / f"{number}.json"
        if record.exists():
            entry: dict[str, Any] = json.loads(record.read_text())
            return entry
        start = number * self.images_per_shard
        images = self.found[start : start + self.images_per_shard]
        folder = self.output / _UNDER_WAY / f"shard-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        binary_writer = import_litdata("litdata.streaming.writer").BinaryWriter
        writer = binary_writer(str(folder), chunk_size=self.images_per_shard, chunk_index=number)
        for i, image in enumerate(images):
            item = {"image": self.source.read(image.position), "path": image.inner_path, "label": image.label or ""}
            writer.add_item(i, item)
        writer.done()
        index = json.loads(next(folder.glob("*index.json")).read_text())
        (chunk,) = index["chunks"]
        entry = {"chunk": chunk, "config": index["config"]}
        # Order matters: the shard is in its place before the record says so.
        (folder / chunk["filename"]).replace(self.output / chunk["filename"])
        with replacing(record) as temporary:
            temporary.write_text(json.dumps(entry))
        shutil.rmtree(folder)
        return entry


def _written(shards: Any, num_workers: int) -> Any:
    from tqdm import tqdm  # type: ignore[import-untyped]

    loader = DataLoader(shards, batch_size=None, num_workers=num_workers, collate_fn=_as_is)
    return tqdm(loader, "writing", unit=" shards")


def _as_is(entry: Any) -> Any:
    return entry


def _plan_of(root: Path, found: Sequence[FoundImage], images_per_shard: int) -> str:
    """What the shards will hold, so that they are not gone on with from other images."""
    digest = hashlib.sha256(f"{root.resolve()} {images_per_shard}".encode())
    for image in found:
        digest.update(f"{image.inner_path}\0{image.label}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
