"""Files that kill, hang or silently shrink a run: each is counted, or refused by one line."""

import io
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_distill.cli import main
from ssl_distill.data.corrupt import Replacement
from ssl_distill.data.doctor import examine
from ssl_distill.data.image_folder import ImageFolderData
from ssl_distill.data.image_paths import list_images
from ssl_distill.data.images import MOST_PIXELS, decode, read_image
from ssl_distill.data.names import escaped, unescaped
from ssl_distill.data.optimize import optimize
from ssl_distill.data.quarantine import read_quarantine, write_quarantine


def picture(seed, size=(30, 20)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for i in range(12):
        path = root / ("cat", "dog")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return root


def data_of(root, **options):
    sizes = {"decode_size": 16, "eval_size": 16, "batch_size": 4, "eval_batch_size": 4, "num_workers": 0, "seed": 0}
    return ImageFolderData(str(root), **{**sizes, **options})


def paths_of(root):
    return [image.inner_path for image in list_images("root", root)[1]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_no_file_is_counted_and_not_waited_for(folder, num_workers, caplog):
    os.mkfifo(folder / "cat" / "pipe.jpg")
    (folder / "cat" / "null.jpg").symlink_to("/dev/zero")
    (folder / "dog" / "lost.jpg").symlink_to("nowhere")
    (folder / "dog" / "round.jpg").symlink_to("round.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "dog" / "socket.jpg"))
    data = data_of(folder, num_workers=num_workers)
    assert sum(len(batch.index) for batch in data.train_dataloader()) == 16
    assert data.parts.train.read.__self__.replacement.corrupt.sum() == 5
    if num_workers == 0:
        for name, reason in (
            ("pipe.jpg", "it is a FIFO, no file"),
            ("null.jpg", "it is a device, no file"),
            ("lost.jpg", "No such file"),
            ("round.jpg", "Too many levels of symbolic links"),
            ("socket.jpg", "it is a socket, no file"),
        ):
            (message,) = (message for message in caplog.messages if name in message)
            assert reason in message


def test_a_pipe_in_place_of_a_list_or_a_tar_is_refused(tmp_path, folder):
    for name in ("list.txt", "all.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=r"`root` must be a folder .* exist|cannot read the folder"):
            data_of(tmp_path / name).parts  # noqa: B018
    os.mkfifo(folder / "all.tar")
    with pytest.raises(OSError, match=r"all.tar: it is a FIFO, no file"):
        data_of(folder).parts  # noqa: B018


def test_links_lead_to_every_folder_once(folder, tmp_path):
    own = paths_of(folder)
    (folder / "cat" / "loop").symlink_to(folder)
    (folder / "aardvark").symlink_to(folder / "dog")  # comes before it, but is not its own name
    (folder / "dog" / "twin").symlink_to(folder / "cat")
    (folder / "self").symlink_to("self")
    with pytest.warns(UserWarning, match="3 links in .* lead to folders that are read already, such as aardvark"):
        assert paths_of(folder) == own
    # Links alone are followed, in the order of their names.
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("dog", "cat"):
        (linked / name).symlink_to(folder / name)
    with pytest.warns(UserWarning, match="lead to folders"):
        assert [path for path in paths_of(linked) if path.count("/") == 1] == own


def png_of(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def jpeg_of(width, height):
    """A JPEG of 8 x 8 pixels that claims more."""
    content = io.BytesIO()
    picture(0, (8, 8)).save(content, "JPEG")
    start = content.getvalue().index(b"\xff\xc0") + 5
    return content.getvalue()[:start] + struct.pack(">HH", height, width) + content.getvalue()[start + 4 :]


@pytest.mark.parametrize("make", [png_of, jpeg_of])
@pytest.mark.parametrize("size", [(11_586, 11_586), (65_000, 2_100), (32_768, 32_768), (60_000, 60_000)])
def test_pictures_that_claim_too_many_pixels_are_not_decoded(make, size):
    assert size[0] * size[1] > MOST_PIXELS
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OSError, match=r"cannot read bomb: it claims more than 134,217,728 pixels"):
        decode(make(*size), "bomb")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_a_picture_of_many_pixels_below_the_limit_is_read():
    """PIL alone would warn."""
    content = io.BytesIO()
    Image.new("1", (10_000, 9_500)).save(content, "PNG")
    assert decode(content.getvalue(), "large").shape == (3, 9_500, 10_000)


def test_other_formats_are_not_tried():
    """PIL starts Ghostscript for this one."""
    with pytest.raises(OSError, match=r"cannot read a\.jpg: it is no image of a known format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "a.jpg")


NAMES = (
    b"caf\xe9.png",
    b"new\nline.png",
    b"tab\t.png",
    b"back\\slash\\n.png",
    b"# no comment.png",
    b"\xe2\x80\xa8.png",
    b"\r.png",
)


def odd_names(folder):
    for i, name in enumerate(NAMES):
        with open(os.path.join(os.fsencode(folder / "cat"), name), "wb") as file:
            picture(100 + i).save(file, "PNG")
    os.mkdir(os.path.join(os.fsencode(folder), b"class\xff"))
    with open(os.path.join(os.fsencode(folder), b"class\xff", b"a.png"), "wb") as file:
        picture(200).save(file, "PNG")


def test_names_of_any_bytes(folder, tmp_path):
    odd_names(folder)
    data = data_of(folder, batch_size=20)
    assert len(data.parts.train) == 20
    assert next(iter(data.train_dataloader())).index.sort().values.tolist() == list(range(20))
    assert data.num_classes == 3
    names = paths_of(folder)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(folder, ".")
    assert {name.split("./")[1] for name in paths_of(tmp_path / "all.tar")} == set(names)
    assert len(data_of(tmp_path / "all.tar", batch_size=20).parts.train) == 20


def test_names_of_any_bytes_in_shards(folder, tmp_path):
    pytest.importorskip("litdata")
    odd_names(folder)
    assert optimize(folder, tmp_path / "shards", images_per_shard=8) == 20
    assert paths_of(tmp_path / "shards") == paths_of(folder)
    assert data_of(tmp_path / "shards", batch_size=20).parts.train.__getitems__(range(20)).index.tolist() == [
        *range(20)
    ]


def test_quarantine_keeps_names_of_any_bytes(folder, capsys):
    odd_names(folder)
    for name in NAMES:
        with open(os.path.join(os.fsencode(folder / "cat"), name), "wb") as file:
            file.write(b"no picture")
    assert main(["doctor", str(folder), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert r"cat/new\nline.png: it is no image of a known format" in printed or "and 4 more" in printed
    reasons, path = read_quarantine(folder)
    assert set(reasons) == {"cat/" + os.fsdecode(name) for name in NAMES}
    assert path.read_bytes().count(b"\n") == 1 + len(NAMES)
    assert len(data_of(folder).parts.train) == 13
    # At the top of a folder, a name may look like a comment.
    write_quarantine(folder, {"#1.png": "a\tb\nc", "plain é.png": "x"})
    assert read_quarantine(folder)[0] == {"#1.png": "a\tb\nc", "plain é.png": "x"}
    assert "plain é.png\tx\n" in path.read_text(encoding="utf-8")


def test_escapes_come_back():
    for name in (*map(os.fsdecode, NAMES), "\\x41", "\\\\n", "\x85", "\U0001f600", "\U00010fff", "", "ü"):
        assert unescaped(escaped(name)) == name
        assert escaped(name).isprintable()
    assert unescaped(r"C:\pictures\q \x4") == r"C:\pictures\q \x4"  # of an older list


def test_what_is_printed_has_no_stray_bytes(folder):
    """As users run it: a terminal takes UTF-8 only."""
    odd_names(folder)
    (folder / "cat" / "00.png").write_bytes(b"")
    run = subprocess.run(
        [sys.executable, "-m", "ssl_distill.cli", "doctor", str(folder), "--workers", "0"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "classes         3, with 1 (class\\udcff) to 13 (cat) images" in run.stdout.decode()


def test_doctor_names_what_is_no_file(folder):
    os.mkfifo(folder / "cat" / "pipe.png")
    (folder / "dog" / "bomb.png").write_bytes(png_of(60_000, 60_000))
    findings = {each.file.inner_path: each for each in examine(folder).findings}
    assert findings["cat/pipe.png"].detail == "it is a FIFO, no file"
    assert findings["dog/bomb.png"].detail == "it claims more than 134,217,728 pixels, the limit `MOST_PIXELS`"
    assert {findings[name].problem for name in ("cat/pipe.png", "dog/bomb.png")} == {"corrupt"}


# Tars


def tar_of(folder, path, **options):
    with tarfile.open(path, "w", **options) as tar:
        for file in sorted(folder.glob("*/*")):
            tar.add(file, file.relative_to(folder))
    return path.read_bytes()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_cut_of_a_tar_is_refused(folder, tmp_path, form):
    whole = tar_of(folder, tmp_path / "a.tar", format=form)
    assert len(paths_of(tmp_path / "a.tar")) == 12
    end = len(whole.rstrip(b"\0")) + 1024
    for size in {*range(0, end, 512), *range(100, end, 700)}:
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a.tar is no uncompressed tar, or is damaged or cut off"):
            paths_of(tmp_path / "a.tar")


def test_a_damaged_header_in_a_tar_is_refused(folder, tmp_path):
    whole = tar_of(folder, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        headers = [member.offset for member in tar]
    for offset in headers:
        for damaged in (b"\xff" + whole[offset + 1 : offset + 512], bytes(512)):
            (tmp_path / "a.tar").write_bytes(whole[:offset] + damaged + whole[offset + 512 :])
            with pytest.raises(ValueError, match=r"a.tar is no uncompressed tar, or is damaged or cut off"):
                paths_of(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole + whole)  # of which a reader sees the first
    with pytest.raises(ValueError, match="what follows is another archive"):
        paths_of(tmp_path / "a.tar")


def test_links_in_a_tar(folder, tmp_path):
    os.link(folder / "cat" / "00.png", folder / "cat" / "hard.png")
    (folder / "cat" / "soft.png").symlink_to("00.png")
    tar_of(folder, tmp_path / "a.tar")
    with pytest.warns(UserWarning, match="1 of 14 images in .*a.tar are links .*, such as cat/soft.png: left out"):
        source, found = list_images("root", tmp_path / "a.tar")
    hard = next(image for image in found if image.inner_path.endswith("hard.png"))
    assert source.read(hard.position) == (folder / "cat" / "00.png").read_bytes()


def test_a_damaged_index_of_a_tar_is_made_anew(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_DISTILL_CACHE", str(tmp_path / "cache"))
    tar_of(folder, tmp_path / "a.tar")
    paths = paths_of(tmp_path / "a.tar")
    (index,) = (tmp_path / "cache" / "tar").glob("*.json")
    for text in ("", "[[", "3", '[["a.png"]]', '{"a": 1}'):
        index.write_text(text)
        assert paths_of(tmp_path / "a.tar") == paths
        assert json.loads(index.read_text()) != text


# Shards


@pytest.fixture
def shards(folder, tmp_path):
    pytest.importorskip("litdata")
    optimize(folder, tmp_path / "shards", images_per_shard=5)
    return tmp_path / "shards"


def test_shards_that_are_not_whole_are_refused(shards):
    chunk = shards / "chunk-0-1.bin"
    whole = chunk.read_bytes()
    for break_it, message in (
        (lambda: chunk.write_bytes(whole[:-1]), rf"{chunk} has {len(whole) - 1} bytes, index.json says {len(whole)}"),
        (lambda: chunk.write_bytes(whole * 2), rf"{chunk} has {2 * len(whole)} bytes"),
        (chunk.unlink, "index.json names a shard that cannot be read: .*chunk-0-1.bin.*copy the shards again"),
        (lambda: os.mkfifo(chunk), "index.json names a shard that cannot be read: .*it is a FIFO"),
    ):
        break_it()
        with pytest.raises(ValueError, match=message):
            data_of(shards).parts  # noqa: B018


def test_a_damaged_item_of_a_shard_is_counted(shards, caplog):
    chunk = shards / "chunk-0-1.bin"
    content = bytearray(chunk.read_bytes())
    (first,) = struct.unpack_from("<I", content, 4)
    content[first : first + 200] = bytes(200)
    chunk.write_bytes(content)
    batch = data_of(shards).parts.train.__getitems__(range(12))
    assert len(batch.image) == 12
    assert len(caplog.messages) >= 1
    assert "corrupt: 1 of 12 files so far: cannot read" in caplog.text


def test_tables_of_shards(shards):
    for text in ("", "path\na\n", "path,label\na\n", 'path,label\n"a', "path,label\na,b,c\n", "a,b\nc,d\n", "\0"):
        (shards / "images.csv").write_text(text)
        with pytest.raises(ValueError, match=r"images\.csv"):
            data_of(shards).parts  # noqa: B018


# The rule


def test_what_is_read_does_not_depend_on_what_was_read_before():
    """A resumed run has another memory of what is corrupt than the run that goes on."""
    good = {0: True, 1: False, 2: True}

    def read(position):
        if not good[position]:
            raise OSError(f"{position} is bad")
        return position

    replacement = Replacement(3, "skip")
    assert [replacement.read(i, read) for i in (0, 1, 2)] == [(0, 0), (2, 2), (2, 2)]
    good[1] = True  # such as the picture of another camera
    assert replacement.read(1, read) == (1, 1)
    assert int(replacement.corrupt.sum()) == 1


@pytest.mark.parametrize(("count", "tolerated"), [(20, 10), (1000, 10), (3000, 30)])
def test_more_than_ten_and_one_percent_stop(count, tolerated):
    replacement = Replacement(count, "skip")
    for position in range(tolerated):
        replacement.note(position, OSError("bad"))
        replacement.note(position, OSError("bad"))  # the same one again
    with pytest.raises(OSError, match=f"{tolerated + 1} of {count} files are corrupt, more than 1 %, the last: bad"):
        replacement.note(tolerated, OSError("bad."))


def test_read_image_names_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(OSError, match=r"cannot read .*a.png: it is a FIFO, no file"):
        read_image(tmp_path / "a.png")
    with pytest.raises(OSError, match="embedded null"):
        read_image("a\0.png")


def test_lists_name_any_file(folder):
    odd_names(folder)
    (folder / "list.txt").write_bytes(b"cat/caf\xe9.png\ncat/00.png\ncat/nul\0.png\n")
    data = data_of(folder / "list.txt", batch_size=3)
    batch = next(iter(data.train_dataloader()))
    assert len(batch.index) == 3
    assert data.parts.train.read.__self__.replacement.corrupt.tolist() == [False, False, True]
    assert torch.equal(batch.source_size[0], torch.tensor([20.0, 30.0]))
