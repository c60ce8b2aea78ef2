"""A folder of the user's for what is slow to make and always the same."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ssl_distill.callbacks.atomic import replacing

Arrays = dict[str, np.ndarray]


def cache_folder() -> Path:
    """`$SSL_DISTILL_CACHE`, else `ssl_distill` in `$XDG_CACHE_HOME` or ~/.cache."""
    if folder := os.environ.get("SSL_DISTILL_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl_distill"


def cached(kind: str, key: Mapping[str, object], make: Callable[[], Arrays]) -> Arrays:
    """Arrays from the cache; made and kept if they are not there. A folder that cannot be written to is no error.

    Args:
        kind: Subfolder.
        key: All that the arrays depend on.
        make: Arrays of numbers or text by name.
    """
    digest = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:20]
    path = cache_folder() / kind / f"{digest}.npz"
    try:
        with open(path, "rb") as file, np.load(file) as kept:
            return dict(kept)
    except (OSError, ValueError, EOFError, BadZipFile):  # missing, or damaged
        arrays = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]  # numpy's stub takes `allow_pickle` for one of them
    except OSError:
        pass
    return arrays
