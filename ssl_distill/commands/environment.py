"""How a run was started, and on what: for its report, and for whoever repeats it."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import ssl_distill
from ssl_distill.callbacks.atomic import replacing

FILE = "environment.json"
_PACKAGES = ("torch", "torchvision", "lightning", "timm", "kornia", "torchmetrics", "jsonargparse", "numpy")


def record_start(folder: Path, args: Sequence[str], num_processes: int, resumed: bool) -> None:
    """Write `environment.json`: one entry, or one more.

    Args:
        folder: Of the run.
        args: The command and its options. What its configs say is kept too: they may change.
        num_processes: Of all nodes.
        resumed: Whether the run goes on with an earlier one, whose entries are kept.
    """
    entry = {
        "command": shlex.join(["ssl-distill", *args]),
        "configs": [{"path": path, "text": Path(path).read_text(encoding="utf-8")} for path in _configs(args)],
        "started": _now(),
        "ended": None,
        "version": ssl_distill.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": num_processes,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    _write(folder, [*(read_environment(folder) if resumed else []), entry])


def record_end(folder: Path) -> None:
    """Note when the last start came to its end."""
    entries = read_environment(folder)
    entries[-1]["ended"] = _now()
    _write(folder, entries)


def read_environment(folder: Path) -> list[dict[str, Any]]:
    """Entries of a run folder, one per start; none if there is no file."""
    path = folder / FILE
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return entries


def _write(folder: Path, entries: list[dict[str, Any]]) -> None:
    with replacing(folder / FILE) as temporary:
        temporary.write_text(json.dumps(entries, indent=1), encoding="utf-8")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _configs(args: Sequence[str]) -> Iterator[str]:
    """Files that `-c FILE`, `--config FILE` or `--config=FILE` name."""
    for option, value in zip(args, [*args[1:], ""], strict=True):
        name, equals, joined = option.partition("=")
        path = joined if equals else value
        if name in ("-c", "--config") and Path(path).is_file():
            yield path


def _commit() -> str | None:
    """Commit of this package's sources, with a + if they were changed since; None where they are no checkout."""
    root = Path(ssl_distill.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
