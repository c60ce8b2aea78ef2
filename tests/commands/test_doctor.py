import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_distill.cli import main
from ssl_distill.data.doctor import examine
from ssl_distill.data.image_folder import ImageFolderData
from ssl_distill.data.quarantine import quarantine_files, read_quarantine, write_quarantine


def picture(seed=0, size=(60, 50)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Eight good pictures in two classes, and one of every kind of trouble."""
    monkeypatch.setenv("SSL_DISTILL_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    for i, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for j in range(4):
            picture(10 * i + j).save(root / name / f"{j}.jpg")
    (root / "cat" / "empty.png").touch()
    (root / "cat" / "short.jpg").write_bytes((root / "cat" / "0.jpg").read_bytes()[:900])
    (root / "cat" / "text.png").write_text("no picture")
    (root / "dog" / "twin.jpg").write_bytes((root / "cat" / "0.jpg").read_bytes())
    picture(99, (10, 40)).save(root / "dog" / "small.png")
    picture(98).convert("CMYK").save(root / "dog" / "print.jpg")
    picture(97).save(root / "dog" / "png.jpg", format="PNG")
    return root


def test_every_trouble_is_found(folder):
    diagnosis = examine(folder)
    found = {(Path(each.file.inner_path).name, each.problem) for each in diagnosis.findings}
    assert found == {
        ("empty.png", "empty"),
        ("short.jpg", "truncated"),
        ("text.png", "corrupt"),
        ("twin.jpg", "duplicate"),
        ("small.png", "tiny"),
        ("print.jpg", "odd mode"),
        ("png.jpg", "wrong suffix"),
    }
    twin = next(each for each in diagnosis.findings if each.problem == "duplicate")
    assert twin.detail == "of cat/0.jpg, which is in class cat"
    assert diagnosis.classes == {"cat": 7, "dog": 8}
    assert diagnosis.shorter_sides == (10, 50, 50)


def test_loaders_leave_out_what_cannot_be_read(folder, capsys, caplog):
    assert main(["doctor", str(folder), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "  truncated            1   the file ends too early" in printed
    assert "classes         2, with 7 (cat) to 8 (dog) images" in printed
    assert f"3 images, which ImageFolderData leaves out: {folder / 'quarantine.txt'}" in printed
    data = ImageFolderData(str(folder), on_corrupt="error", decode_size=16, eval_size=16, num_workers=0)
    train = data.parts.train
    assert f"3 of 15 images in {folder} left out by {folder / 'quarantine.txt'}" in caplog.text
    assert len(train) == 12
    assert len(train.__getitems__(range(12)).image) == 12  # every file can be read


def test_two_processes_find_the_same(folder):
    assert examine(folder, num_workers=2) == examine(folder)


def test_more_can_be_left_out_and_nothing(folder, capsys):
    assert main(["doctor", str(folder), "--workers", "0", "--quarantine", "tiny", "duplicates"]) == 0
    assert set(read_quarantine(folder)[0]) == {"dog/small.png", "dog/twin.jpg"}
    assert main(["doctor", str(folder), "--workers", "0", "--quarantine"]) == 0  # looks only
    assert set(read_quarantine(folder)[0]) == {"dog/small.png", "dog/twin.jpg"}
    for path in folder.glob("*/*.[jp][pn]g"):
        if not path.stem.isdigit():
            path.unlink()
    assert main(["doctor", str(folder), "--workers", "0"]) == 0
    assert capsys.readouterr().out.endswith("quarantine      nothing\n")
    assert not (folder / "quarantine.txt").exists()


def test_a_read_only_folder_has_its_list_in_the_cache(folder, monkeypatch):
    beside, cached = quarantine_files(folder)
    beside.mkdir()  # nothing can be written there, even by root
    assert write_quarantine(folder, {"cat/text.png": "corrupt"}) == cached
    assert read_quarantine(folder) == ({"cat/text.png": "corrupt"}, cached)
    assert os.environ["SSL_DISTILL_CACHE"] in str(cached)


def test_a_list_of_files(folder):
    files = folder / "files.txt"
    files.write_text("cat/0.jpg,cat\ncat/text.png,cat\ndog/1.jpg,dog\n")
    assert main(["doctor", str(files), "--workers", "0"]) == 0
    assert read_quarantine(files)[1] == folder / "files.quarantine.txt"
    data = ImageFolderData(str(files), num_workers=0)
    assert len(data.parts.train) == 2


def test_errors(tmp_path, folder, capsys):
    write_quarantine(folder, {path.relative_to(folder).as_posix(): "tiny" for path in folder.glob("*/*")})
    with pytest.raises(ValueError, match=r"holds 15 images, all of which .*quarantine.txt leaves out"):
        ImageFolderData(str(folder)).setup("fit")
    (tmp_path / "nothing").mkdir()
    for args, message in (
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([str(tmp_path / "nothing")], "holds no images"),
        ([str(folder), "--workers", "-1"], "`--workers` must be at least 0"),
        ([str(folder), "--quarantine", "ugly"], "invalid choice"),
    ):
        assert main(["doctor", *args]) == 2
        assert message in capsys.readouterr().err
