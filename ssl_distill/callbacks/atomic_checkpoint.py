"""Checkpoints that survive a full disk, and those in shards."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from ssl_distill.callbacks.atomic import replacing
from ssl_distill.reading.shards import check_shards, read_shards
from ssl_distill.reading.tensors import load_tensors


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the old one and renames it, so that a full disk or a kill leaves the old one whole.

    What is read is compared with its checksums first, and holds tensors and plain values, whatever is asked for.

    Deviation: Lightning writes to the system's temporary folder, from where a move to another disk is a copy over the
    old checkpoint, and holds the whole file in memory meanwhile.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint`; to a URL as Lightning does.

        Raises:
            OSError: If it cannot be written; the checkpoint that was there is kept.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)  # which would put the file's own name into it
        except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
            reason = _first_reason(error)
            raise OSError(f"cannot write the checkpoint {path} ({reason}); the one before it is kept.") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, place: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file, or put together a folder that `ShardedStrategy` wrote.

        Raises:
            ValueError: If it is damaged, or holds more than tensors and plain values.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        if Path(path).is_dir():
            check_shards(path)
            return read_shards(path)
        checkpoint: dict[str, Any] = load_tensors(path, "ckpt_path")
        return checkpoint


def _first_reason(error: BaseException) -> str:
    """What the system said, such as that there is no space, where torch's writer covers it by an error of its own."""
    reason = str(error).partition("\n")[0]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            reason = cause.strerror
        cause = cause.__cause__ or cause.__context__
    return reason
