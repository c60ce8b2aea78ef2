"""Every malformed json of objects is either read well or refused by one clear line."""

import copy
import json

import pytest
from PIL import Image

from ssl_distill.data.coco_objects import CocoObjectsData

GOOD = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 60, "height": 40},
        {"id": 2, "file_name": "b.png", "width": 60, "height": 40},
    ],
    "annotations": [
        {"id": i, "image_id": 1 + i % 2, "bbox": [0, 0, 30, 20], "category_id": 5, "iscrowd": 0} for i in range(4)
    ],
    "categories": [{"id": 9, "name": "bird"}, {"id": 5, "name": "cat"}],
}
NAN, INFINITY = float("nan"), float("inf")
ABSENT = object()
POLYGON = [0, 0, 30, 0, 30, 20]
VALUES = {  # of a place in the json: what may be found there
    ("images",): [ABSENT, None, {}, [], "all", 3, [None], [[]], [3]],
    ("annotations",): [ABSENT, None, {}, [], "all", 3, [None], [[]]],
    ("categories",): [ABSENT, None, {}, [], "all", 3, [None], [{}], [{"id": 5}], [{"id": 5, "name": None}]],
    ("images", 0): [None, [], "a.png", 1],
    ("images", 0, "id"): [ABSENT, None, 2, NAN, 1.0, [1], {}, True, "1"],
    ("images", 0, "file_name"): [ABSENT, None, 3, "", "gone.png", "a\0.png", "\ud800.png", ".", ["a.png"]],
    ("images", 0, "height"): [ABSENT, None, 0, -40, NAN, INFINITY, 40.5, 40.0, "40", [40], True, 10**400, 10**9],
    ("images", 0, "width"): [ABSENT, None, 0, -1, 1e300],
    ("annotations", 0): [None, [], "box", 0],
    ("annotations", 0, "id"): [ABSENT, None, 1, NAN, [1], {}, "x" * 10_000],
    ("annotations", 0, "image_id"): [ABSENT, None, 3, NAN, [1], {}, "1", True],
    ("annotations", 0, "category_id"): [ABSENT, None, 3, NAN, [5], {}, "5", 5.0],
    ("annotations", 0, "iscrowd"): [ABSENT, None, 1, "yes", []],
    ("annotations", 0, "score"): [None, NAN, INFINITY, "0.9", [1], 0.1, 1],
    ("annotations", 0, "bbox"): [
        *(ABSENT, None, [], {}, 3, "0 0 1 1", [0, 0, 30], [0, 0, 30, 20, 1], [[0, 0, 30, 20]]),
        *([0, 0, -30, 20], [0, 0, 0, 0], [0, 0, NAN, 20], [0, 0, INFINITY, 20], [0, 0, None, 20], [0, 0, "30", 20]),
        *([1e300, 0, 30, 20], [10**400, 0, 30, 20], [-1e6, -1e6, 2e6, 2e6], [True, 0, 30, 20]),
    ],
    ("annotations", 0, "segmentation"): [
        *(None, [], {}, 3, "mask", POLYGON, [[]], [[1]], [[1, 2]], [[*POLYGON, 7]], [[*POLYGON[:5], None]]),
        *([[*POLYGON[:5], NAN]], [[*POLYGON[:5], INFINITY]], [[*POLYGON[:5], "2"]], [[1e300, *POLYGON[1:]]], [None]),
        *([{"size": [40, 60]}], {"size": [40, 60]}, {"counts": [2400]}, {"size": [40, 60], "counts": [2399]}),
        *({"size": None, "counts": [2400]}, {"size": [60, 40], "counts": [2400]}, {"size": [40], "counts": [2400]}),
        *(
            {"size": [40, 60], "counts": counts}
            for counts in ([-1, 2401], [NAN], ["2400"], None, 3, {}, "~~~", "", "é")
        ),
    ],
    ("categories", 0, "id"): [ABSENT, None, 5, NAN, "9", [9], {}],
    ("categories", 0, "name"): [ABSENT, None, 3, ""],
}
TEXTS = [b"", b"{", b"[]", b"null", b"3", b'"images"', b"\xff\xfe{}", b"[" * 100_000, b"{}" * 2, b"[1, 2]", b"1" * 5000]


def variants():
    for place, values in VALUES.items():
        for value in values:
            content = copy.deepcopy(GOOD)
            *way, last = place
            parent = content
            for step in way:
                parent = parent[step]
            if value is ABSENT:
                del parent[last]
            else:
                parent[last] = value
            name = "absent" if value is ABSENT else repr(value)[:30]
            yield pytest.param(
                json.dumps(content).encode(),
                id=f"{'.'.join(map(str, place))} {name}".encode("ascii", "replace").decode(),
            )
    for text in TEXTS:
        yield pytest.param(text, id=f"text {text[:10]!r}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name in "ab":
        Image.new("RGB", (60, 40), (0, 99, 0)).save(root / f"{name}.png")
    return root


@pytest.mark.parametrize("text", [*variants()])
@pytest.mark.filterwarnings("ignore:[12] of [34] boxes in .* show less than a pixel")
def test_read_well_or_refused_in_one_line(text, folder):
    (folder / "objects.json").write_bytes(text)
    data = CocoObjectsData(str(folder), str(folder / "objects.json"), decode_size=16, eval_size=16, num_workers=0)
    try:
        parts = data.load()
        train = parts.train.read([0, 1])
        evaluated = [part.read(list(part.positions)) for part in (parts.bank, parts.queries)]
    except (ValueError, OSError) as error:
        message = str(error)
    else:
        assert train.boxes_xyxy.isfinite().all()
        assert train.boxes_xyxy.min() >= 0
        assert train.boxes_xyxy.max() <= 1
        assert all(batch.label.max() < max(len(data.class_names), 1) for batch in evaluated)
        return
    assert "objects.json" in message
    assert "\n" not in message
    assert len(message) < 500


def test_the_good_one_is_read(folder):
    (folder / "objects.json").write_text(json.dumps(GOOD))
    data = CocoObjectsData(str(folder), str(folder / "objects.json"), num_workers=0)
    assert data.load().train.read([0, 1]).num_objects.tolist() == [2, 2]
    assert data.class_names == ("cat", "bird")
