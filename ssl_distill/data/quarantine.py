"""Files that `ssl-distill doctor` found unfit, which loaders leave out."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from ssl_distill.cache import cache_folder
from ssl_distill.callbacks.atomic import replacing
from ssl_distill.data.names import escaped, unescaped

_HEADING = "# Files that loaders leave out: path, tab, reason. Written by `ssl-distill doctor`, which replaces it.\n"


def quarantine_files(root: Path) -> list[Path]:
    """Where the list of a folder, or of a list of files, may be: beside the data, else in the user's cache."""
    beside = root / "quarantine.txt" if root.is_dir() else root.with_suffix(".quarantine.txt")
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return [beside, cache_folder() / "quarantine" / f"{name}.txt"]


def read_quarantine(root: Path) -> tuple[dict[str, str], Path | None]:
    """Reasons by path inside `root`, and the file that says so; none where there is no list."""
    for path in quarantine_files(root):
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
            rows = [line.partition("\t") for line in lines if line and not line.startswith("#")]
            return {unescaped(name): unescaped(reason) for name, _, reason in rows}, path
    return {}, None


def write_quarantine(root: Path, reasons: Mapping[str, str]) -> Path | None:
    """Replace the list; into the cache if `root` is read-only. Without reasons an old list is removed.

    Returns:
        The file, or None if there is nothing to leave out.
    """
    files = quarantine_files(root)
    if not reasons:
        for path in files:
            path.unlink(missing_ok=True)
        return None
    text = _HEADING + "".join(f"{_cell(name)}\t{_cell(reason)}\n" for name, reason in sorted(reasons.items()))
    for path in files:
        try:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
            return path
        except OSError:
            if path == files[-1]:
                raise
    raise AssertionError("there are two places")


def _cell(text: str) -> str:
    """Text that is no comment, and holds neither tab nor line break."""
    return escaped(text).replace("#", r"\x23", 1) if text.startswith("#") else escaped(text)
