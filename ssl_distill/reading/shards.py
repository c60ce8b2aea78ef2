"""Folders of `torch.distributed.checkpoint`: what torch unpickles whole is read with a list of what may be in it."""

import io
import json
import pickle
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from ssl_distill.reading.tensors import load_tensors

_CHECKSUMS = "checksums-{}.json"
_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {  # all that torch's own `Metadata` is made of
    *(
        (_METADATA, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    *(("torch", str(value).rpartition(".")[2]) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class ShardReader(FileSystemReader):
    """torch's reader of a folder; its table of contents is read at once, and nothing in it is run.

    Args:
        path: The folder.

    Raises:
        ValueError: If the table is damaged, holds what it need not, or names files outside the folder.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._table = _read_table(Path(path))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of contents."""
        return self._table


def _read_table(path: Path) -> Metadata:
    file = path / ".metadata"
    try:
        with file.open("rb") as opened:
            table = _MetadataUnpickler(opened).load()
        outside = [info.relative_path for info in table.storage_data.values() if not _is_name(info.relative_path)]
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`ckpt_path` {path} has a .metadata that holds a {error}, which is not loaded because it might run code."
            if "." in str(error)
            else f"`ckpt_path` {path} has a damaged .metadata ({error})."
        ) from error
    except OSError as error:
        raise ValueError(f"`ckpt_path` {path} is no checkpoint in shards: it has no .metadata.") from error
    except Exception as error:  # bytes that make no pickle end in whatever they happen to mean
        raise ValueError(f"`ckpt_path` {path} has a damaged .metadata ({type(error).__name__}).") from error
    if outside:
        raise ValueError(f"`ckpt_path` {path} has a .metadata that names {outside[0]}, a file outside the folder.")
    return table


def _is_name(path: str) -> bool:
    return Path(path).name == path


class PlainPlanner(DefaultLoadPlanner):
    """torch's planner for values beside the tensors, which it would unpickle whole: here they are plain ones."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Read a value as plain, and hand on what was read."""
        try:
            plain = torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"its entry {read_item.storage_index.fqn} holds more than tensors and plain values, and might run code."
            ) from error
        again = io.BytesIO()
        torch.save(plain, again)
        again.seek(0)
        super().load_bytes(read_item, again)


def load_shards(
    state: dict[str, Any], reader: ShardReader, planner: PlainPlanner | None = None, no_dist: bool = False
) -> None:
    """Fill a state in place, by all ranks together.

    Args:
        state: Tensors, whole or each rank's share, and places for values.
        reader: Of the folder.
        planner: None asks for all that is in `state`.
        no_dist: Whether this process reads for itself.

    Raises:
        ValueError: If something is missing or does not fit, or holds more than tensors and plain values.
    """
    try:
        load(state, storage_reader=reader, planner=planner or PlainPlanner(), no_dist=no_dist)
    except CheckpointException as error:  # no `Exception`, and its text is every rank's traceback
        reason, _ = next(iter(error.failures.values()))
        raise ValueError(f"`ckpt_path` {reader.checkpoint_id} cannot be loaded: {reason}") from error


def read_shards(path: str | Path) -> dict[str, Any]:
    """A checkpoint in shards as one on a single device; it has to fit into main memory.

    Args:
        path: Folder of `torch.distributed.checkpoint`, and `meta.pt` with what Lightning adds.

    Raises:
        ValueError: If it is damaged, or holds more than tensors and plain values.
    """
    rest: dict[str, Any] = load_tensors(Path(path) / "meta.pt", "ckpt_path")
    reader = ShardReader(path)
    table = reader.read_metadata()
    flat: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in table.state_dict_metadata.items()
    }
    # Not flattened, so that values land in `flat` itself.
    planner = PlainPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load_shards(flat, reader, planner, no_dist=True)
    whole = unflatten_state_dict(flat, table.planner_data)
    optimizers = sorted((key for key in whole if key.startswith("optimizer_")), key=lambda key: int(key[10:]))
    states = {"optimizer_states": [whole[key] for key in optimizers]} if optimizers else {}
    return {**rest, "state_dict": whole["state_dict"], **states}


def write_checksums(folder: Path, rank: int) -> None:
    """Note the checksums of what a rank wrote; rank 0 also notes those of the files that belong to none.

    Args:
        folder: With all that belongs to the checkpoint.
        rank: Of this process.
    """
    own = [
        file
        for file in sorted(folder.iterdir())
        if file.name.startswith(f"__{rank}_") or (rank == 0 and not file.name.startswith("__"))
    ]
    (folder / _CHECKSUMS.format(rank)).write_text(json.dumps({file.name: _checksum(file) for file in own}))


def check_shards(path: str | Path) -> None:
    """Compare every file of a folder with its checksum, if it has any.

    Raises:
        ValueError: If one does not fit, is missing, or is not listed.
    """
    if reason := find_damaged_shard(Path(path)):
        raise ValueError(f"`ckpt_path` {path} is damaged ({reason}).")


def find_damaged_shard(folder: Path) -> str | None:
    """What is wrong with a folder by its checksums; None if nothing is, or it has none."""
    sums: dict[str, int] = {}
    lists = sorted(folder.glob(_CHECKSUMS.format("*")))
    try:
        for file in lists:
            sums |= json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError):
        return f"{file.name} is no list of checksums"
    missing = [name for name in sums if not (folder / name).is_file()]
    if missing:
        return f"it has no {missing[0]}"
    unknown = [file.name for file in folder.iterdir() if lists and file not in lists and file.name not in sums]
    if unknown:
        return f"{unknown[0]} belongs to another checkpoint, or its list of checksums is missing"
    differing = (name for name, checksum in sums.items() if _checksum(folder / name) != checksum)
    return next((f"the checksum of {name} does not fit" for name in differing), None)


def has_shard_checksums(folder: Path) -> bool:
    """Whether a folder has checksums; those of other tools and of version 0.1 have none."""
    return any(folder.glob(_CHECKSUMS.format("*")))


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            checksum = zlib.crc32(part, checksum)
    return checksum
