"""Checkpoints that survive a full disk, and those in shards."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from ssl_distill.callbacks.atomic import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the old one and renames it, so that a full disk or a kill leaves the old one whole.

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
            with replacing(path) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
            reason = str(error).partition("\n")[0]
            raise OSError(f"cannot write the checkpoint {path} ({reason}); the one before it is kept.") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, place: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file, or put together a folder that `ShardedStrategy` wrote."""
        if "://" not in str(path) and Path(path).is_dir():
            return read_shards(path)
        return super().load_checkpoint(path, map_location, weights_only)


def read_shards(path: str | Path) -> dict[str, Any]:
    """A checkpoint in shards as one on a single device; it has to fit into main memory.

    Args:
        path: Folder of `torch.distributed.checkpoint`, and `meta.pt` with what Lightning adds.
    """
    checkpoint: dict[str, Any] = torch.load(Path(path) / "meta.pt", map_location="cpu", weights_only=True)
    with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix=".whole-") as folder:
        file = Path(folder) / "whole.pt"
        dcp_to_torch_save(path, file)
        whole = torch.load(file, map_location="cpu", weights_only=True)
    optimizers = sorted((key for key in whole if key.startswith("optimizer_")), key=lambda key: int(key[10:]))
    states = {"optimizer_states": [whole[key] for key in optimizers]} if optimizers else {}
    return {**checkpoint, "state_dict": whole["state_dict"], **states}
