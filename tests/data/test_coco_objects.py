import importlib.util
import json

import pytest
import torch
from PIL import Image

from ssl_distill.data.coco_json import read_coco
from ssl_distill.data.coco_objects import CocoObjectsData

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
    green = batch.image[0, 1] > 127
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
    assert (batch.masks[0, 0] == (batch.image[0, 1] > 127)).float().mean() > 0.95


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
        ([], {"images": [{"id": 1}]}, "must be COCO's json .+ KeyError"),
    ],
)
@pytest.mark.filterwarnings("ignore:1 of 1 boxes")
def test_errors(annotations, kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        data_of(tmp_path, annotations, kwargs)


def test_errors_of_masks_and_files(tmp_path):
    code = {"size": [HEIGHT, 2 * WIDTH], "counts": [2 * WIDTH * HEIGHT]}
    data = data_of(tmp_path, [annotation([0, 0, 30, 20], segmentation=code)])
    with pytest.raises(ValueError, match="mask of annotation 7 must be as large as its image, 60 x 40, got 120 x 40"):
        data.parts.train.read([0])
    code = {"size": [HEIGHT, WIDTH], "counts": [5]}
    data = data_of(tmp_path, [annotation([0, 0, 30, 20], segmentation=code)])
    with pytest.raises(ValueError, match="mask of annotation 7 must have 2400 pixels, got 5"):
        data.parts.train.read([0])
    data = data_of(tmp_path, [annotation([0, 0, 30, 20])])
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png is 40 x 60 pixels, its annotations are for 60 x 40"):
        data.parts.train.read([0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"images": "nowhere"}, "`images` must be a folder, nowhere is none"),
        ({"annotations": "nowhere.json"}, "`annotations` must be a json file, nowhere.json does not exist"),
        ({"object_unit": "pixel"}, "`object_unit` must be one of instance, category, got pixel"),
        ({"max_objects": 0}, "`max_objects` must be at least 1, got 0"),
        ({"val_images": "."}, "`val_images` and `val_annotations` must be given together"),
    ],
)
def test_errors_of_arguments(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CocoObjectsData(**{"images": str(tmp_path), "annotations": write(tmp_path, []), **kwargs})
