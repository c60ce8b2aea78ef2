"""Files of `torch.save` and of safetensors as tensors and plain values: nothing in them is run."""

import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from safetensors.torch import load_file

_ZIP = b"PK\x03\x04"
_DOS_FOLDER = 0x10
_UNREADABLE = "is damaged, perhaps cut off, or no file of torch.save"


def load_tensors(path: str | Path, name: str = "checkpoint", mmap: bool = False, known: Sequence[type] = ()) -> Any:
    """What a file holds, on the CPU; one of safetensors is told by its suffix.

    All that torch has written since version 1.6 is a zip, whose checksums (CRC-32) are compared first.

    Args:
        path: The file.
        name: Of the argument that gave it, for messages.
        mmap: Whether tensors are read when they are looked at, and from the file as it is by then.
        known: Classes that may be made besides tensors and plain values.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is damaged, or holds anything else.
    """
    if Path(path).suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # safetensors has its own error type, not exported in a stable place
            raise ValueError(f"`{name}` {path} is no safetensors file, or cut off ({_first_line(error)}).") from error
    if reason := find_damage(path):
        raise ValueError(f"`{name}` {path} is damaged, perhaps cut off ({reason}).")
    try:
        with torch.serialization.safe_globals(list(known)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle that is refused anyway
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and has_checksums(path))
    except pickle.UnpicklingError as error:
        # Not torch's own words: they advise to load the file with whatever is in it.
        if found := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error)):
            names = ["tensors", "plain values", *(f"{each.__module__}.{each.__name__}" for each in known)]
            raise ValueError(
                f"`{name}` {path} holds a {found[1]}, which is not loaded because it might run code; known are"
                f" {', '.join(names)}."
            ) from error
        raise ValueError(f"`{name}` {path} {_UNREADABLE}.") from error
    except Exception as error:  # torch's zip reader and the values themselves each have their own
        reason = "holds a program (TorchScript), which is not loaded" if "TorchScript" in str(error) else _UNREADABLE
        raise ValueError(f"`{name}` {path} {reason}.") from error


def has_checksums(path: str | Path) -> bool:
    """Whether a file is one of torch since version 1.6; those before have no checksums."""
    with open(path, "rb") as file:
        return file.read(len(_ZIP)) == _ZIP


def find_damage(path: str | Path) -> str | None:
    """What is wrong with a file of torch by its own checksums; None if nothing is, or it has none.

    Read once, at the speed of the disk or of CRC-32.
    """
    if not has_checksums(path):
        return None
    try:
        with ZipFile(path) as content:
            entry = content.testzip()
            # torch takes an entry with this attribute for a folder, and leaves its tensor unfilled.
            folder = next((info.filename for info in content.infolist() if info.external_attr & _DOS_FOLDER), None)
    except Exception as error:  # a damaged header may ask for a password, another compression, a place before 0 ...
        return _first_line(error)
    if folder is not None:
        return f"its entry {folder!r} is a folder"
    return None if entry is None else f"the checksum of its entry {entry!r} does not fit"


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).partition("\n")[0].split()).rstrip(".")
