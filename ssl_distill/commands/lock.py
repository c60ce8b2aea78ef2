"""Which process writes to a run folder."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from ssl_distill.callbacks.atomic import replacing

try:
    import fcntl
except ImportError:  # Windows: two runs that start in the same instant are not told apart there
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"


class Writer(NamedTuple):
    """A process that writes to a run folder.

    Attributes:
        host: Its machine.
        pid: Its number there.
        started: Its start in clock ticks since the machine's, as numbers are used again; empty where there is no /proc.
        since: When it began to.
    """

    host: str
    pid: int
    started: str
    since: str


def this_process() -> Writer:
    """This process, from now on."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Writer(socket.gethostname(), os.getpid(), _started(os.getpid()) or "", now)


def take(folder: Path) -> Writer | None:
    """Make this process the writer of a folder, in the place of one that has ended.

    What tells a writer is in the file, not in the lock of an open file, which loader processes would inherit and hold
    until they have noticed that the run was killed.

    Args:
        folder: Of the run; it exists.

    Returns:
        None, or another writer that may be under way.
    """
    with undisturbed(folder):
        writer = _read(folder)
        if writer is not None and may_be_under_way(writer):
            return writer
        with replacing(folder / LOCK) as temporary:
            temporary.write_text(json.dumps(this_process()._asdict()), encoding="utf-8")
    return None


def release(folder: Path) -> None:
    """Give the folder back, if this process has it."""
    writer = _read(folder)
    if writer is not None and (writer.host, writer.pid) == (socket.gethostname(), os.getpid()):
        (folder / LOCK).unlink()


def in_use(folder: Path, writer: Writer) -> str:
    """What to say of a folder that another process writes to."""
    told = f"{folder} is in use by process {writer.pid} on {writer.host} since {writer.since}"
    if writer.host == socket.gethostname():
        return f"{told}; wait until it has ended, stop it by `kill {writer.pid}`, or give another folder."
    return f"{told}, which cannot be seen from {socket.gethostname()}; if it has ended, remove {folder / LOCK}."


def _read(folder: Path) -> Writer | None:
    """The writer; None if there is none, or the file is none of ours."""
    try:
        return Writer(**json.loads((folder / LOCK).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def may_be_under_way(writer: Writer) -> bool:
    """Whether it has not ended, as far as this machine can tell."""
    if writer.host != socket.gethostname():
        return True
    if writer.started:
        return _started(writer.pid) == writer.started
    try:
        os.kill(writer.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> str | None:
    """When a process started; None if it has ended, or where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended; its parent has not asked yet


@contextmanager
def undisturbed(folder: Path) -> Iterator[None]:
    """No other process looks and takes meanwhile."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks have no such locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
