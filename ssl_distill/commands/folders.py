"""Which folder a run writes to, so that no run overwrites another."""

import glob
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssl_distill.commands.lock import in_use, release, take

_TOLD = "SSL_DISTILL_RUN_FOLDER"  # the parent's choice, for the ranks that Lightning starts by the same command


@contextmanager
def run_folder(root: Path, checkpoint: Path | None) -> Iterator[Path]:
    """The folder of a run; all its processes agree on it.

    Args:
        root: Where the run should go. If a run is there or under way, it goes to root-2, root-3, and so on.
        checkpoint: What the run resumes from; one in root, root-2, ... is gone on with in its own folder.

    Raises:
        ValueError: If another process writes to the folder that is gone on with, or that all ranks have found.
    """
    if told := os.environ.get(_TOLD):
        yield Path(told)
        return
    folder = next((each for each in _family(root) if checkpoint and each.samefile(checkpoint.parent)), None)
    if folder is not None:
        _take_or_refuse(folder)
    else:
        folder = _first_free(root)
    os.environ[_TOLD] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop(_TOLD, None)
        release(folder)


def find_checkpoint(name: str, root: Path) -> Path:
    """A checkpoint by path, or "last" or "best": that of the newest of root, root-2, ... that has it.

    Raises:
        ValueError: If there is none.
    """
    if name not in ("last", "best"):
        if not Path(name).exists():
            raise ValueError(f"`ckpt_path` {name} does not exist; give a .ckpt file, or last or best.")
        return Path(name)
    if told := os.environ.get(_TOLD):
        return Path(told) / f"{name}.ckpt"
    found = [folder / f"{name}.ckpt" for folder in _family(root) if (folder / f"{name}.ckpt").exists()]
    if not found:
        raise ValueError(f"`ckpt_path` is {name}, but {root} holds no {name}.ckpt; leave it out to start afresh.")
    return found[-1]


def _family(root: Path) -> list[Path]:
    """Existing folders among root, root-2, root-3, ..., by age."""
    numbered = []
    for path in root.parent.glob(f"{glob.escape(root.name)}-*"):
        number = path.name.removeprefix(f"{root.name}-")
        if number.isdecimal() and int(number) > 1:
            numbered.append((int(number), path))
    return [path for path in (root, *(path for _, path in sorted(numbered))) if path.is_dir()]


def _first_free(root: Path) -> Path:
    """First of root, root-2, ... that holds no last.ckpt and that no other run is writing to; it is taken."""
    for number in itertools.count(1):
        folder = root if number == 1 else root.with_name(f"{root.name}-{number}")
        if (folder / "last.ckpt").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        # Ranks that torchrun or SLURM started have no parent to ask. They find the same folder, since a last.ckpt
        # appears only after all have joined, and cannot look for another one each.
        if "LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ:
            _take_or_refuse(folder)
            return folder
        if take(folder) is None:
            return folder
    raise AssertionError("itertools.count ends")


def _take_or_refuse(folder: Path) -> None:
    """Of several ranks the first one takes it."""
    is_first = all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
    if is_first and (writer := take(folder)) is not None:
        raise ValueError(in_use(folder, writer))
