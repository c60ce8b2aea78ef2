"""Damaged checkpoints: said in one line, whatever byte it is, or read as they were written."""

import random
import re
import shutil

import pytest
import torch
import torch.distributed.checkpoint
from test_cli import error_of

from ssl_distill.callbacks.atomic_checkpoint import AtomicCheckpointIO
from ssl_distill.commands import checkpoints
from ssl_distill.commands.checkpoints import read_checkpoint
from ssl_distill.reading.shards import check_shards, read_shards, write_checksums
from ssl_distill.reading.tensors import load_tensors


def content():
    generator = torch.Generator().manual_seed(0)
    return {"global_step": 7, "state_dict": {name: torch.randn(50, generator=generator) for name in "abc"}}


def same(first, second):
    return (
        first.keys() == second.keys()
        and first["global_step"] == second["global_step"]
        and first["state_dict"].keys() == second["state_dict"].keys()
        and all(torch.equal(first["state_dict"][name], value) for name, value in second["state_dict"].items())
    )


def test_every_byte_of_a_file(tmp_path):
    """Each byte is turned once, alone and with the next; a good read is the content that was written."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(), path)
    whole, expected = path.read_bytes(), content()
    turn, refused, messages = random.Random(0), 0, set()
    for position in range(len(whole) - 1):
        for length in (1, 2):
            damaged = bytearray(whole)
            for offset in range(length):
                damaged[position + offset] ^= turn.randrange(1, 256)
            path.write_bytes(damaged)
            try:
                found = load_tensors(path, "ckpt_path")
            except ValueError as error:
                refused += 1
                messages.add(str(error))
            else:
                assert same(found, expected), position
    assert all(re.fullmatch(rf"`ckpt_path` {path} (is damaged|holds).*", message) for message in messages)  # one line
    assert refused > len(whole) / 2  # the rest is padding


def test_files_that_are_cut_off(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"last\.ckpt is damaged, perhaps cut off"):
            load_tensors(path, "ckpt_path")


@pytest.fixture
def run(tmp_path):
    """Two checkpoints, of which the last has two damaged bytes in a weight."""
    for name in ("best", "last"):
        torch.save(content(), tmp_path / f"{name}.ckpt")
    damaged = bytearray((tmp_path / "last.ckpt").read_bytes())
    position = damaged.index(content()["state_dict"]["b"].numpy().tobytes())
    damaged[position] ^= 255
    damaged[position + 1] ^= 255
    (tmp_path / "last.ckpt").write_bytes(damaged)
    torch.load(tmp_path / "last.ckpt", weights_only=True)  # torch itself sees nothing
    (tmp_path / "config.yaml").write_text("model: {}")
    return tmp_path


def test_another_checkpoint_is_named(run, capsys):
    damage = r"last\.ckpt is damaged, perhaps cut off \(the checksum of its entry \S+ does not fit\)"
    with pytest.raises(ValueError, match=damage + r"; go on from \S+best\.ckpt, which is whole\.$"):
        read_checkpoint(run / "last.ckpt")
    assert "go on from" in error_of(["export", str(run / "last.ckpt")], capsys)
    shutil.copy(run / "last.ckpt", run / "best.ckpt")
    torch.save(content(), run / "old.ckpt", _use_new_zipfile_serialization=False)  # of which nobody knows
    with pytest.raises(ValueError, match=damage + "; there is no other whole checkpoint beside it"):
        read_checkpoint(run / "last.ckpt")
    with pytest.raises(ValueError, match=damage):
        AtomicCheckpointIO().load_checkpoint(run / "last.ckpt")


def test_checkpoints_without_checksums(run, monkeypatch):
    said = []
    monkeypatch.setattr(checkpoints, "rank_zero_info", said.append)
    assert same(read_checkpoint(run / "best.ckpt"), content())
    assert not said
    torch.save(content(), run / "old.ckpt", _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(run / "old.ckpt"), content())
    assert said == [f"{run / 'old.ckpt'} has no checksums: nobody can tell whether it is what was written"]


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "last.ckpt"
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        torch.distributed.checkpoint.save({"state_dict": content()["state_dict"]}, checkpoint_id=folder)
    torch.save({"global_step": 7}, folder / "meta.pt")
    write_checksums(folder, 0)
    return folder


def test_every_file_of_a_folder(shards, tmp_path):
    assert same(read_shards(shards), content())
    check_shards(shards)
    names = {path.name for path in shards.iterdir()}
    assert names == {".metadata", "__0_0.distcp", "meta.pt", "checksums-0.json"}
    for name in sorted(names):
        whole = (shards / name).read_bytes()
        for position in range(0, len(whole), 11):
            damaged = bytearray(whole)
            damaged[position] ^= 1 + position % 255
            (shards / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=r"last\.ckpt is damaged"):
                check_shards(shards)
        if name != "checksums-0.json":  # without it, the folder is one of version 0.1
            (shards / name).unlink()
            with pytest.raises(ValueError, match=r"last\.ckpt is damaged \(it has no "):
                check_shards(shards)
        (shards / name).write_bytes(whole)
    check_shards(shards)
    (shards / "__1_0.distcp").write_bytes(b"of another run")
    torch.save(content(), tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match=r"__1_0\.distcp belongs to another .*; go on from \S+best\.ckpt"):
        read_checkpoint(shards)


def test_folders_without_checksums(shards, monkeypatch):
    said = []
    monkeypatch.setattr(checkpoints, "rank_zero_info", said.append)
    read_checkpoint(shards)
    assert not said
    (shards / "checksums-0.json").unlink()
    assert read_checkpoint(shards)["global_step"] == 7
    assert "has no checksums" in said[0]


def test_official_weights_are_compared_too(run):
    with pytest.raises(ValueError, match=r"`teacher` \S+last\.ckpt is damaged"):
        load_tensors(run / "last.ckpt", "teacher", mmap=True)
