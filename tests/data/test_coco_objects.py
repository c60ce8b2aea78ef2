import importlib.util
import json
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_distill.data.coco_json import read_coco
from ssl_distill.data.coco_objects import CocoObjectsData
from ssl_distill.data.module import Squashed
from ssl_distill.data.optimize import optimize
from ssl_distill.draws import Draws

WIDTH, HEIGHT = 60, 40


def annotation(box, image_id=1, **kwargs):
    return {"id": 7, "image_id": image_id, "bbox": box, "category_id": 5, **kwargs}


def write(folder, annotations, **kwargs):
    """Two images, red but for a green quarter at the upper left, and their json."""
    for name in ("a.png", "b.png"):
        image = Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0))
        image.paste((0, 255, 0), (0, 0, WIDTH // 2, HEIGHT // 2))
        image.save(folder / name)
    content = {
        "images": [
            {"id": i + 1, "file_name": f"{name}.png", "width": WIDTH, "height": HEIGHT} for i, name in enumerate("ab")
        ],
        "annotations": annotations,
        "categories": [{"id": 9, "name": "bird"}, {"id": 5, "name": "cat"}],
        **kwargs,
    }
    path = folder / "objects.json"
    path.write_text(json.dumps(content))
    return str(path)


def data_of(folder, annotations, json_kwargs=None, **kwargs):
    sizes = {"decode_size": 32, "eval_size": 32, "num_workers": 0, "batch_size": 2}
    path = write(folder, annotations, **(json_kwargs or {}))
    data = CocoObjectsData(str(folder), path, **{**sizes, **kwargs})
    data.setup("fit")
    return data


def squashed(batch):
    """Its images at the size of its masks."""
    return Squashed(batch.masks.shape[-1])(batch, Draws(0, 0)).image


def quarter_runs():
    """The green quarter as runs of 0 and 1, column by column."""
    rows, columns = HEIGHT // 2, WIDTH // 2
    runs = [0]
    for _ in range(columns):
        runs += [rows, HEIGHT - rows]
    runs[-1] += (WIDTH - columns) * HEIGHT
    return {"size": [HEIGHT, WIDTH], "counts": runs}


@pytest.mark.parametrize(
    "segmentation",
    [None, [[0, 0, 30, 0, 30, 20, 0, 20]], quarter_runs()],
    ids=["box", "polygon", "run lengths"],
)
def test_masks_lie_on_the_object(segmentation, tmp_path):
    data = data_of(tmp_path, [annotation([0, 0, 30, 20], segmentation=segmentation)])
    batch = data.parts.train.read([0, 1])
    green = squashed(batch)[0, 1] > 127
    assert (batch.masks[0, 0] == green).float().mean() > 0.95
    torch.testing.assert_close(batch.boxes_xyxy[0, 0], torch.tensor([0.0, 0.0, 0.5, 0.5]))
    assert batch.num_objects.tolist() == [1, 0]
    assert not batch.masks[1].any()
    assert batch.source_size.tolist() == [[HEIGHT, WIDTH]] * 2
    evaluated = data.parts.bank.read([0])
    assert (evaluated.mask[0] == (evaluated.image[0, 1] > 127)).float().mean() > 0.95
    assert data.class_names[int(evaluated.label)] == "cat"


@pytest.mark.skipif(importlib.util.find_spec("pycocotools") is None, reason="optional package")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_compressed_run_lengths(tmp_path):
    from pycocotools import mask as coco_mask

    code = coco_mask.frPyObjects(quarter_runs(), HEIGHT, WIDTH)
    code["counts"] = code["counts"].decode()
    batch = data_of(tmp_path, [annotation([0, 0, 30, 20], segmentation=code)]).parts.train.read([0])
    assert (batch.masks[0, 0] == (squashed(batch)[0, 1] > 127)).float().mean() > 0.95


def test_objects_are_clipped_sorted_and_grouped(tmp_path):
    boxes = [[50, 30, 100, 100], [0, 0, 20, 20], [70, 0, 5, 5], [10, 10, 0, 10], [5, 5, 30, 30]]
    annotations = [annotation(box) for box in boxes] + [
        annotation([0, 0, 60, 40], iscrowd=1),
        annotation([0, 0, 60, 40], score=0.1),
    ]
    path = write(tmp_path, annotations)
    with pytest.warns(UserWarning, match="2 of 5 boxes in .+ show less than a pixel .+, such as that of annotation 7"):
        images, names = read_coco(path, str(tmp_path))
    assert names == ("cat", "bird")
    assert [parts[0].box_xyxy for parts in images[0].objects] == [(5, 5, 35, 35), (0, 0, 20, 20), (50, 30, 60, 40)]
    with pytest.warns(UserWarning, match="dropped"):
        images, _ = read_coco(path, str(tmp_path), object_unit="category")
    assert [len(parts) for parts in images[0].objects] == [3]


def test_a_detectors_boxes(tmp_path):
    """Neither ids nor categories."""
    boxes = [{"image_id": i, "bbox": [0, 0, 30, 20], "score": 0.9} for i in (1, 2)]
    data = data_of(tmp_path, boxes, {"categories": []})
    assert data.num_classes is None
    assert data.parts.queries.read([0]).label.tolist() == [-1]
    assert len(data.parts.bank) + len(data.parts.queries) == 2


@pytest.fixture
def gallery(tmp_path, monkeypatch):
    """Ten pictures in two folders, and objects of all but one; the json names them in another order."""
    monkeypatch.setenv("SSL_DISTILL_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    root = tmp_path / "pictures"
    entries = []
    for i in range(10):
        file = root / ("ab"[i % 2]) / f"{i}.{'png' if i % 3 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (40 + i, 60, 3), dtype=np.uint8)).save(file)
        entries.append({"id": i, "file_name": str(file.relative_to(root)), "width": 60, "height": 40 + i})
    entries[4]["file_name"] = f"./{entries[4]['file_name']}"
    objects = [annotation([i, i, 20, 30 - i], image_id=i) for i in range(9)]
    path = tmp_path / "objects.json"
    categories = [{"id": 5, "name": "cat"}]
    path.write_text(json.dumps({"images": entries[::-1], "annotations": objects, "categories": categories}))
    return root


def shards_of(root):
    pytest.importorskip("litdata")
    optimize(root, root.parent / "shards", images_per_shard=4)
    return root.parent / "shards"


def tars_of(root):
    tars = root.parent / "tars"
    tars.mkdir()
    for folder, name in (("a", "a"), ("b", "./b")):
        with tarfile.open(tars / f"{folder}.tar", "w") as tar:
            tar.add(root / folder, name)
    return tars


def tar_of(root):
    with tarfile.open(root.parent / "all.tar", "w") as tar:
        tar.add(root, ".")
    return root.parent / "all.tar"


@pytest.mark.parametrize("pack", [shards_of, tars_of, tar_of])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_and_tars_give_the_folders_batches(pack, num_workers, gallery):
    def data(images, num_workers):
        sizes = {"decode_size": 24, "eval_size": 16, "batch_size": 3, "eval_batch_size": 4, "seed": 3}
        json_file = str(gallery.parent / "objects.json")
        return CocoObjectsData(str(images), json_file, str(images), json_file, num_workers=num_workers, **sizes)

    ours, folder = data(pack(gallery), num_workers), data(gallery, 0)
    for loader, other in zip(
        [ours.train_dataloader(), *ours.val_dataloader()],
        [folder.train_dataloader(), *folder.val_dataloader()],
        strict=True,
    ):
        batches, expected = list(loader), list(other)
        assert len(batches) == len(expected) == 3
        for batch, its_equal in zip(batches, expected, strict=True):
            for name, value in batch._asdict().items():
                assert torch.equal(value, getattr(its_equal, name)), name
    assert len(torch.cat([batch.index for batch in ours.train_dataloader()]).unique()) == 9


def test_errors_of_shards_and_tars(gallery):
    def load(images):
        CocoObjectsData(str(images), str(gallery.parent / "objects.json"), num_workers=0).load()

    tars = tars_of(gallery)
    (tars / "b.tar").rename(gallery.parent / "b.tar")
    with pytest.raises(ValueError, match=rf"names 5 of 10 files that are not in {tars}, such as b/9.jpg\."):
        load(tars)
    with tarfile.open(tars / "again.tar", "w") as tar:
        tar.add(gallery / "a" / "2.png", "a/2.png")
    with pytest.raises(ValueError, match=r"holds several images of one name, such as a/2.png"):
        load(tars)
    theirs = gallery.parent / "theirs"
    theirs.mkdir()
    (theirs / "index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds shards without images.csv, so not of images"):
        load(theirs)


@pytest.mark.parametrize(
    ("annotations", "kwargs", "message"),
    [
        (
            [annotation([0, 0, float("nan"), 5])],
            {},
            r"`bbox` of annotation 7 must be 4 finite numbers, got \[0, 0, nan",
        ),
        ([annotation([0, 0, 5])], {}, "must be 4 finite numbers"),
        ([annotation([0, 0, 5, 5], image_id=3)], {}, "annotation 7 is of image 3, not in images"),
        ([annotation([40, 20, 60, 40])] * 3, {}, "`bbox` must be x, y, width, height; 3 of 3 end outside their image"),
        ([], {}, "must name images with objects, 2 images have none"),
        ([annotation([70, 50, 5, 5])], {}, "must name images with objects, 2 images have none"),
        (
            [],
            {"images": [{"id": 1, "file_name": "gone.png", "width": 60, "height": 40}]},
            "names 1 of 1 files that are not in .+, such as gone.png",
        ),
        (
            [annotation([0, 0, 30, 20], segmentation={"size": [HEIGHT, 2 * WIDTH], "counts": [2 * WIDTH * HEIGHT]})],
            {},
            "mask of annotation 7 must be as large as its image, 60 x 40, got 120 x 40",
        ),
        (
            [annotation([0, 0, 30, 20], segmentation={"size": [HEIGHT, WIDTH], "counts": [5]})],
            {},
            "mask of annotation 7 must have 2400 pixels, got 5",
        ),
        ([], {"images": [{"id": 1}]}, "objects.json: image 1 must have a `file_name`, got None"),
    ],
)
@pytest.mark.filterwarnings("ignore:1 of 1 boxes")
def test_errors(annotations, kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        data_of(tmp_path, annotations, kwargs)


def test_a_picture_that_cannot_be_used_is_named_counted_and_replaced(tmp_path, caplog):
    boxes = [annotation([0, 0, 30, 20]), annotation([10, 10, 20, 20], image_id=2)]
    for break_it, reason in (
        (lambda: Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "a.png"), "is 40 x 60 pixels, .* are for 60 x 40"),
        (lambda: (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60]), "cannot read .*a.png"),
    ):
        data, strict = data_of(tmp_path, boxes), data_of(tmp_path, boxes, on_corrupt="error")
        break_it()
        caplog.clear()
        for _ in range(2):
            batch = data.parts.train.read([0, 1])
            assert batch.index.tolist() == [0, 1]
            torch.testing.assert_close(batch.boxes_xyxy[0], batch.boxes_xyxy[1])  # with the picture, its objects
            assert torch.equal(batch.masks[0], batch.masks[1])
            assert batch.num_objects.tolist() == [1, 1]
        assert len(caplog.messages) == 1
        assert re.search(f"corrupt: 1 of 2 files so far: .*{reason}", caplog.text)
        labelled = data.parts.bank.read([0])
        assert torch.equal(labelled.mask[0], data.parts.bank.read([1]).mask[0])
        with pytest.raises(OSError, match=r"a.png.*set `on_corrupt` to skip"):
            strict.parts.train.read([0])


def test_only_images_with_objects_stand_in_where_evaluators_read(tmp_path):
    data = data_of(tmp_path, [annotation([0, 0, 30, 20])])
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(OSError, match=r"none of 2 files can be used, the last: cannot read .*a.png"):
        data.parts.bank.read([0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"images": "nowhere"}, "`images` must be a folder of images or of shards, or a .tar, nowhere is none"),
        ({"annotations": "nowhere.json"}, "`annotations` must be a json file, nowhere.json does not exist"),
        ({"object_unit": "pixel"}, "`object_unit` must be one of instance, category, got pixel"),
        ({"max_objects": 0}, "`max_objects` must be at least 1, got 0"),
        ({"val_images": "."}, "`val_images` and `val_annotations` must be given together"),
    ],
)
def test_errors_of_arguments(kwargs, message, tmp_path, unchecked):
    with pytest.raises(ValueError, match=message):
        CocoObjectsData(**{"images": str(tmp_path), "annotations": write(tmp_path, []), **kwargs})
