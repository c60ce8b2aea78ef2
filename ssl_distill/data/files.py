"""Reading of whole files that may be anything: one clear error, and nothing that is waited for."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from ssl_distill.data.names import escaped

_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def check_regular(path: str | os.PathLike[str]) -> int:
    """The size of a file in bytes. To be asked before it is opened: a FIFO would be waited for.

    Raises:
        OSError: If there is none, or it is a folder, a FIFO, a socket or a device.
    """
    try:
        status = os.stat(path)
    except ValueError as error:  # what no file system takes as a name
        raise OSError(f"cannot read {escaped(os.fspath(path))}: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a folder")
        raise OSError(f"cannot read {escaped(os.fspath(path))}: it is {kind}, no file")
    return status.st_size


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """All of a regular file.

    Raises:
        OSError: If it cannot be read, or is none.
    """
    check_regular(path)
    return Path(path).read_bytes()


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a json file says.

    Raises:
        ValueError: If it is no json.
        OSError: If it cannot be read.
    """
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{escaped(os.fspath(path))} is no json, or damaged: {error}.") from error
