import logging

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_distill.data.image_folder import ImageFolderData
from ssl_distill.data.images import evaluation_view, read_image


def picture(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def classes(tmp_path):
    for i in range(40):
        folder = tmp_path / ("cat" if i % 2 else "dog")
        folder.mkdir(exist_ok=True)
        picture(i).save(folder / f"{i:02}.jpg")
    return tmp_path


def data_of(root, **kwargs):
    sizes = {"decode_size": 24, "eval_size": 16, "batch_size": 4, "num_workers": 0}
    data = ImageFolderData(str(root), **{**sizes, **kwargs})
    data.setup("fit")
    return data


def test_class_folders_give_labels_to_evaluators_only(classes):
    data = data_of(classes)
    batches = list(data.train_dataloader())
    assert len(batches) == 10
    assert batches[0].image.shape == (4, 3, 24, 24)
    assert batches[0].source_size.tolist() == [[30, 40]] * 4
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(40))
    assert data.class_names == ("cat", "dog")
    bank, queries = map(list, data.val_dataloader())
    labels = torch.cat([batch.label for batch in bank + queries])
    assert labels.bincount().tolist() == [20, 20]
    indices = torch.cat([batch.index for batch in bank + queries])
    assert len(indices.unique()) == 40


def test_flat_and_nested_folders_have_no_labels(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for i in range(6):
        picture(i).save(tmp_path / ("a/b" if i % 2 else ".") / f"{i}.png")
    data = data_of(tmp_path, batch_size=2)
    assert data.num_classes is None
    assert all((batch.label == -1).all() for loader in data.val_dataloader() for batch in loader)


def names(data, part):
    paths = data.parts.train.read.__self__.source.paths
    return {paths[position] for position in getattr(data.parts, part).positions}


def test_bank_and_queries_stay_when_files_are_added(classes):
    before = data_of(classes)
    for i in range(40, 44):
        picture(i).save(classes / "dog" / f"{i}.jpg")
    after = data_of(classes)
    assert len(names(before, "queries")) == len(names(after, "queries")) == 8
    assert len(names(before, "queries") & names(after, "queries")) >= 6
    assert not names(after, "bank") & names(after, "queries")


def test_hidden_files_are_no_images(classes):
    (classes / "dog" / "._00.jpg").write_bytes(b"of another system")
    (classes / ".cache").mkdir()
    picture(0).save(classes / ".cache" / "a.jpg")
    assert len(data_of(classes).parts.train) == 40


def test_queries_of_another_folder(classes, tmp_path):
    flat, labelled = tmp_path / "flat", tmp_path / "labelled"
    flat.mkdir()
    labelled.mkdir()
    for i in range(5):
        picture(i).save(flat / f"{i}.jpg")
    for name in ("cat", "dog"):
        (classes / name).rename(labelled / name)

    data = data_of(labelled, val_root=str(labelled))  # bank from `root`, queries from `val_root`, both whole
    assert [len(part) for part in data.parts[:3]] == [40, 40, 40]
    data = data_of(flat, val_root=str(labelled))  # only `val_root` has labels: bank and queries are parts of it
    assert [len(part) for part in data.parts[:3]] == [5, 32, 8]
    assert data.class_names == ("cat", "dog")
    (labelled / "emu").mkdir()
    picture(0).save(labelled / "emu" / "0.jpg")
    two = labelled / "list.txt"
    two.write_text("cat/01.jpg cat\ndog/00.jpg dog\n" * 3)
    with pytest.raises(ValueError, match=r"has a class emu that `root` .* has not"):
        data_of(two, val_root=str(labelled))


def test_folders_called_train_and_val_are_no_classes(classes):
    (classes / "cat").rename(classes / "train")
    (classes / "dog").rename(classes / "val")
    with pytest.warns(UserWarning, match="holds train, val, which are no classes; set `root` and `val_root`"):
        assert data_of(classes).num_classes is None
    assert data_of(classes, labels="folder").num_classes == 2


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("a.jpg,10\nsub dir/b, c.PNG,9\n", ("9", "10")),  # numbers in their order
        ('path,label\na.jpg,x\n\n"sub dir/b, c.PNG",y\n', ("x", "y")),  # heading, empty row, quotes
        ("a.jpg\tx\nsub dir/b, c.PNG y\n", ("x", "y")),
        ("a.jpg\nsub dir/b, c.PNG\n", ()),
        ("a.jpg,x\nsub dir/b, c.PNG\n", ()),  # a label is missing
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "txt"])
def test_rows_of_lists(tmp_path, rows, expected, suffix):
    (tmp_path / "sub dir").mkdir()
    picture(0).save(tmp_path / "a.jpg")
    picture(1).save(tmp_path / "sub dir" / "b, c.PNG")
    (tmp_path / f"list.{suffix}").write_text(rows)
    data = data_of(tmp_path / f"list.{suffix}", batch_size=2)
    assert data.class_names == expected
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch.index.tolist()) == [0, 1]


def test_lists(classes):
    rows = [f"{name}/{i:02}.jpg,{name}" for i in range(40) for name in ["cat" if i % 2 else "dog"]]
    (classes / "list.csv").write_text("\n".join(rows))
    assert data_of(classes / "list.csv").class_names == ("cat", "dog")


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_files_are_named_counted_and_replaced(classes, workers, caplog):
    whole = (classes / "cat" / "01.jpg").read_bytes()
    (classes / "cat" / "01.jpg").write_bytes(whole[: len(whole) // 2])
    (classes / "dog" / "02.jpg").write_bytes(b"")
    (classes / "dog" / "04.jpg").write_text("no picture")
    data = data_of(classes, num_workers=workers)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batches = list(data.train_dataloader())
            assert sum(len(batch.index) for batch in batches) == 40
    assert data.parts.train.read.__self__.replacement.corrupt.sum() == 3
    if workers == 0:
        for name in ("01.jpg", "02.jpg", "04.jpg"):
            assert sum(name in message for message in caplog.messages) == 1
    with pytest.raises(OSError, match=r"01.jpg.*set `on_corrupt` to skip"):
        list(data_of(classes, on_corrupt="error").train_dataloader())


def test_mostly_corrupt_folder_stops(classes):
    for path in sorted(classes.rglob("*.jpg"))[:12]:
        path.write_bytes(b"")
    with pytest.raises(OSError, match="files are corrupt, more than 1 %"):
        list(data_of(classes).train_dataloader())


def test_formats(tmp_path):
    grey16 = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    transparent = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    files = {
        "grey.jpg": picture(0).convert("L"),
        "cmyk.jpg": picture(0).convert("CMYK"),
        "deep.png": Image.fromarray(grey16),
        "palette.png": transparent.convert("RGB").quantize(4),
        "clear.png": transparent,
        "one.png": picture(0, (1, 1)),
        "wide.png": picture(0, (10_000, 20)),
        "a.webp": picture(0),
        "a.bmp": picture(0),
        "a.tif": picture(0),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
        decoded = read_image(tmp_path / name)
        assert decoded.dtype == torch.uint8
        assert decoded.shape == (3, image.height, image.width)
        assert evaluation_view(decoded, 32).shape == (3, 32, 32)
    assert read_image(tmp_path / "deep.png").max() == 255
    assert abs(int(read_image(tmp_path / "deep.png").float().mean()) - 127) <= 1
    assert read_image(tmp_path / "clear.png").min() == 255


def test_a_folders_pictures_are_upright(tmp_path):
    """Every format's and every orientation's pixels are in `test_images`; here they come through the data module."""
    corners = np.array([[[200, 30, 30], [30, 200, 30]], [[30, 30, 200], [220, 220, 220]]], dtype=np.uint8)
    upright = corners.repeat(8, 0).repeat(8, 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    for name in ("a.png", "b.png"):
        Image.fromarray(np.rot90(upright)).save(tmp_path / name, exif=exif)
    data = data_of(tmp_path, batch_size=2, decode_size=16)
    batch = next(iter(data.train_dataloader()))
    expected = torch.from_numpy(upright).movedim(-1, 0)
    for image in batch.image:
        torch.testing.assert_close(image, expected)


def test_errors(tmp_path, classes, unchecked):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.md").write_text("no image")
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "bad.txt").write_text("cat/01.jpg\nnothing\n")
    mixed = tmp_path / ".mixed"  # hidden from `classes`
    (mixed / "cat").mkdir(parents=True)
    picture(0).save(mixed / "cat" / "0.jpg")
    picture(0).save(mixed / "stray.jpg")
    table = [
        (lambda: data_of(tmp_path / "nowhere"), "`root` must be a folder .* does not exist"),
        (lambda: data_of(empty), r"`root` .*empty holds no images; looked in all its folders for .jpg"),
        (lambda: data_of(classes, batch_size=41), "`batch_size` must be at most 40 for 40 images on 1 rank"),
        (lambda: data_of(classes, batch_size=0), "`batch_size` must be at least 1, got 0"),
        (lambda: data_of(classes, num_workers=-1), "`num_workers` must be at least 0, got -1"),
        (
            lambda: data_of(tmp_path / "notes.md"),
            r"`root` must be a folder of images or of shards, a .tar, or a .txt or .csv list, got the file",
        ),
        (lambda: data_of(tmp_path / "bad.txt"), r"bad.txt line 2 must be an image path .* got 'nothing"),
        (
            lambda: data_of(mixed, labels="folder"),
            "`labels` folder needs every image in a class, .*stray.jpg is in none",
        ),
        (lambda: data_of(classes, on_corrupt="ignore"), "`on_corrupt` must be one of skip, error, got ignore"),
        (lambda: data_of(classes, labels="folders"), "`labels` must be one of auto, folder, none, got folders"),
    ]
    for call, message in table:
        with pytest.raises(ValueError, match=message):
            call()
