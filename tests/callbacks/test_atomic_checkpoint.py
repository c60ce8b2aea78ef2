import os
import resource
import time

import pytest
import torch
from torch import nn

from ssl_distill.callbacks.atomic import replacing
from ssl_distill.callbacks.atomic_checkpoint import AtomicCheckpointIO
from ssl_distill.export import export_backbone


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


@pytest.fixture
def guessed(monkeypatch):
    """Somebody who knows what cannot be known."""
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)
    return f".last.{'0' * 16}.writing.ckpt"


@pytest.mark.parametrize("name", [".last.writing.ckpt", ".last.0.writing.ckpt"])
def test_links_are_not_followed(tmp_path, name):
    """Neither one by the name of version 0.1, nor the file itself."""
    target = tmp_path / "precious"
    target.write_text("precious")
    for place in (name, "last.ckpt"):
        (tmp_path / place).symlink_to(target)
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert target.read_text() == "precious"
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"step": 1}


def test_a_guessed_name_is_refused(tmp_path, guessed):
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / guessed).symlink_to(target)
    with pytest.raises(FileExistsError), replacing(tmp_path / "last.ckpt") as temporary:
        temporary.write_text("new")
    assert target.read_text() == "precious"
    assert (tmp_path / guessed).is_symlink()


def test_a_link_that_comes_while_it_is_written_is_not_followed(tmp_path):
    """Its mode stays, and it does not become the file."""
    target = tmp_path / "precious"
    target.write_text("precious")
    target.chmod(0o600)
    with pytest.raises(OSError, match="symbolic link"), replacing(tmp_path / "last.ckpt") as temporary:  # noqa: PT012
        temporary.unlink()
        temporary.symlink_to(target)
    assert target.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["precious"]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path, mask):
    """Those of safetensors too, whose own are for their owner alone."""
    old = os.umask(mask)
    try:
        (tmp_path / "plain").touch()
        AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
        export_backbone(nn.Linear(2, 2), tmp_path / "backbone.safetensors")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_what_a_kill_left_is_removed_an_hour_later(tmp_path):
    """Neither what another process may be writing, nor what belongs to other files."""
    beside = [".last.a.writing.ckpt", ".last.b.writing.ckpt", ".best.a.writing.ckpt", ".last.a.writing.csv", "last.txt"]
    for name in beside:
        (tmp_path / name).write_text("")
    os.mkdir(tmp_path / ".last.c.writing.ckpt")  # of a checkpoint in shards
    for name in (".last.a.writing.ckpt", ".last.c.writing.ckpt", ".best.a.writing.ckpt", "last.txt"):
        os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    with replacing(tmp_path / "last.ckpt") as temporary:
        temporary.write_text("new")
    assert sorted(os.listdir(tmp_path)) == sorted(["last.ckpt", *beside[1:]])
