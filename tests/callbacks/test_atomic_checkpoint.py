import os
import resource

import pytest
import torch

from ssl_distill.callbacks.atomic import replacing
from ssl_distill.callbacks.atomic_checkpoint import AtomicCheckpointIO


class HalfWritten:
    """Pickled after a megabyte of weights, and then the disk is full."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


def test_writes_what_torch_loads(tmp_path):
    path = tmp_path / "new folder" / "last.ckpt"
    for value in (1, 2):
        AtomicCheckpointIO().save_checkpoint({"step": value, "weight": torch.full((3,), value)}, path)
    assert torch.load(path, weights_only=True)["step"] == 2
    assert os.listdir(path.parent) == ["last.ckpt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, error):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*last.ckpt \(.+\); the one before it is kept"):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "weight": torch.zeros(1000), "rest": HalfWritten(error)}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.fixture
def small_files():
    """No file may grow beyond 100,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_files")
def test_a_device_without_space(tmp_path):
    """The file that is really written, not only the pickling, fails."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(OSError, match="the one before it is kept"):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "weight": torch.zeros(300_000)}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_replacing_after_an_interruption(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
