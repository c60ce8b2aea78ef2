"""Tars and LitData's shards give what the folder gives that they were made of."""

import io
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_distill.cli import main
from ssl_distill.data import optimize as optimize_module
from ssl_distill.data import sources
from ssl_distill.data.image_folder import ImageFolderData
from ssl_distill.data.images import read_image
from ssl_distill.data.optimize import optimize

SIZES = {"decode_size": 24, "eval_size": 16, "batch_size": 4, "eval_batch_size": 4, "seed": 3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_DISTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten pictures, JPEG and PNG, one of them damaged."""
    root = tmp_path / "folder"
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(10):
            pixels = random.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.{'png' if i % 3 else 'jpg'}")
    (root / "dog" / "07.png").write_bytes(b"\x89PNG and no more")
    return root


@pytest.fixture
def shards(folder, tmp_path):
    pytest.importorskip("litdata")
    assert main(["data", "optimize", str(folder), str(tmp_path / "shards"), "--images-per-shard", "6"]) == 0
    return tmp_path / "shards"


def data_of(root, **options):
    return ImageFolderData(str(root), **{"num_workers": 0, **SIZES, **options})


def assert_same_batches(loader, other):
    batches, others = list(loader), list(other)
    assert len(batches) == len(others) > 0
    for batch, expected in zip(batches, others, strict=True):
        for name, value in batch._asdict().items():
            assert torch.equal(value, getattr(expected, name)), name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_give_the_folders_batches(folder, shards, num_workers):
    ours, expected = data_of(shards, num_workers=num_workers), data_of(folder)
    assert len(list(shards.glob("*.bin"))) == 4
    assert_same_batches(ours.train_dataloader(), expected.train_dataloader())
    for loader, other in zip(ours.val_dataloader(), expected.val_dataloader(), strict=True):
        assert_same_batches(loader, other)
    assert ours.class_names == expected.class_names == ("cat", "dog")


def test_a_run_goes_on_in_mid_epoch_and_ranks_share_it(shards, monkeypatch):
    data = data_of(shards)
    whole = [batch.index.tolist() for batch in data.train_dataloader()]
    sampler = data.sampler(data.parts.train, 4)
    sampler.resume_at(0, 2)
    loader = data._loader(data.train_dataloader().dataset, 4, sampler)
    rest = [batch.index.tolist() for batch in loader]
    assert rest == whole[2:]
    for rank in range(2):
        monkeypatch.setattr("ssl_distill.data.module.world_size", lambda: 2)
        monkeypatch.setattr("ssl_distill.data.module.rank", lambda rank=rank: rank)
        mine = [batch.index.tolist() for batch in data_of(shards, batch_size=2).train_dataloader()]
        assert mine == [batch[rank::2] for batch in whole]


def test_a_damaged_image_in_a_shard_is_named(shards, caplog):
    files = data_of(shards).parts.train
    files.__getitems__(range(20))
    assert f"cannot read {shards}:dog/07.png: it is no image of a known format" in caplog.text
    with pytest.raises(OSError, match=r"dog/07.png.*set `on_corrupt` to skip"):
        data_of(shards, on_corrupt="error").parts.train.__getitems__(range(20))


def test_an_interrupted_command_goes_on(folder, tmp_path, monkeypatch):
    pytest.importorskip("litdata")
    output = tmp_path / "shards"
    read = sources.FileSource.read
    monkeypatch.setattr(
        sources.FileSource, "read", lambda self, position: read(self, position) if position < 14 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        optimize(folder, output, images_per_shard=6)
    with pytest.raises(ValueError, match="holds no images"):  # not to be trained on yet
        data_of(output).parts  # noqa: B018
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.bin")}
    assert len(before) == 2
    monkeypatch.setattr(sources.FileSource, "read", read)
    time.sleep(0.01)
    with pytest.raises(ValueError, match="shards of other data or of another size"):
        optimize(folder, output, images_per_shard=5)
    assert optimize(folder, output, images_per_shard=6) == 20
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("*.bin")}
    assert len(after) == 4
    assert before.items() <= after.items()  # what was done is not done again
    assert {path.name for path in output.iterdir()} == {*after, "index.json", "images.csv"}
    assert_same_batches(data_of(output).train_dataloader(), data_of(folder).train_dataloader())


def pack(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_tars_of_webdataset(folder, tmp_path):
    files = sorted(path for path in folder.glob("*/*") if path.name != "07.png")
    root = tmp_path / "tars"
    root.mkdir()
    for shard, part in enumerate((files[:7], files[7:])):
        members = []
        for path in part:
            key = f"{path.parent.name}_{path.stem}"
            members += [(f"{key}{path.suffix}", path.read_bytes()), (f"{key}.json", b"{}")]
            members.append((f"{key}.cls", str(int(path.parent.name == "dog")).encode()))
        pack(root / f"{shard:06d}.tar", members)
    data = data_of(root, num_workers=2)
    assert data.parts.train.__len__() == 18
    assert data.class_names == ("0", "1")
    batch = data.parts.train.__getitems__(range(18))
    assert batch.source_size.tolist() == [list(map(float, read_image(path).shape[1:])) for path in files]
    assert sum(len(each.index) for each in data.train_dataloader()) == 16
    one = data_of(root / "000001.tar")
    assert len(one.parts.train) == 11


def test_tars_with_folders_have_the_folders_classes(folder, tmp_path):
    pack(tmp_path / "all.tar", [(f"./{path.relative_to(folder)}", path.read_bytes()) for path in folder.glob("*/*")])
    data = data_of(tmp_path / "all.tar")
    assert data.parts.train.__len__() == 20
    assert data.class_names == ("cat", "dog")


def test_a_tar_is_indexed_once(folder, tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    pack(path, [("a.jpg", (folder / "cat" / "00.jpg").read_bytes())])
    assert len(data_of(path).parts.train) == 1
    monkeypatch.setattr(sources, "_tar_rows", lambda shard: 1 / 0)
    assert len(data_of(path).parts.train) == 1
    os.utime(path, (1, 1))
    with pytest.raises(ZeroDivisionError):
        data_of(path).parts  # noqa: B018


def test_errors(folder, tmp_path, capsys, monkeypatch):
    pack(tmp_path / "packed.tar", [("a.jpg", b"")], "w:gz")
    with pytest.raises(ValueError, match=r"packed.tar is no uncompressed tar"):
        data_of(tmp_path / "packed.tar").parts  # noqa: B018
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds shards without images.csv"):
        data_of(tmp_path / "theirs").parts  # noqa: B018
    for args, message in (
        ([str(folder), str(folder / "cat")], "`OUT` must be a new or empty folder"),
        ([str(tmp_path / "nowhere"), "x"], "`DIR` must be a folder of images"),
        ([str(folder), "x", "--data.init_args.root", "y"], "unrecognized arguments: --data.init_args.root y"),
        ([str(folder), "x", "--images-per-shard", "0"], "`--items-per-shard` must be at least 1"),
    ):
        assert main(["data", "optimize", *args]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(optimize_module, "import_litdata", lambda module: sources.import_litdata(f"no_{module}"))
    with pytest.raises(ValueError, match=r"pip install 'ssl-distill\[stream\]'"):
        optimize(folder, tmp_path / "x")


def test_an_error_in_a_writing_process_is_one_line(folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("litdata")
    monkeypatch.setattr(sources, "read_bytes", lambda path: Path(path).with_suffix(".gone").read_bytes())
    assert main(["data", "optimize", str(folder), str(tmp_path / "x"), "--workers", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: [Errno 2] No such file")
    assert error.endswith("00.gone'")


def test_names_that_are_no_files_are_left_out_of_shards(folder, tmp_path, capsys, caplog):
    pytest.importorskip("litdata")
    (folder / "cat" / "lost.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "cat" / "pipe.png")
    assert main(["data", "optimize", str(folder), str(tmp_path / "x"), "--workers", "0"]) == 0
    assert capsys.readouterr().out.startswith("20 images in")
    for name, reason in (("lost.jpg", "No such file"), ("pipe.png", "it is a FIFO, no file")):
        (message,) = (message for message in caplog.messages if name in message)
        assert reason in message
    for i in range(10):
        (folder / "dog" / f"lost{i}.jpg").symlink_to("nowhere")
    with pytest.raises(OSError, match=r"11 of 32 files are corrupt, more than 1 %, the last: .*No such file"):
        optimize(folder, tmp_path / "y")


def test_a_shard_has_a_size_that_its_format_can_count(folder, tmp_path, monkeypatch):
    pytest.importorskip("litdata")
    sizes = [path.stat().st_size for path in sorted(folder.glob("cat/*"))]
    monkeypatch.setattr(optimize_module, "_MOST_BYTES", sum(sizes[:4]))
    with pytest.raises(ValueError, match="`--items-per-shard` must be at most 3, got 20: a shard holds less than 4"):
        optimize(folder, tmp_path / "x", images_per_shard=20)


def test_shards_are_not_made_twice(folder, shards):
    with pytest.raises(ValueError, match="holds shards already"):
        optimize(folder, shards)
    (shards / "images.csv").write_text("path,label\na.jpg,\n")
    with pytest.raises(ValueError, match=r"holds 20 items, its images.csv 1"):
        data_of(shards).parts  # noqa: B018


def test_names_that_are_files_here_are_names(folder, tmp_path, monkeypatch):
    """LitData takes text for a file where there is one of that name, and would pack it again."""
    pytest.importorskip("litdata")
    monkeypatch.chdir(folder)
    assert main(["data", "optimize", ".", str(tmp_path / "inside"), "--workers", "0"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["data", "optimize", "folder", str(tmp_path / "outside"), "--workers", "0"]) == 0
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).glob("*.bin")) for name in ("inside", "outside")]
    assert sizes[0] == sizes[1]
    assert_same_batches(data_of("inside").train_dataloader(), data_of("folder").train_dataloader())
