import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_distill.data.shapes import LAYOUTS, SHAPES, ShapesData, object_masks, render

AREAS = {name: n / 2 * math.sin(2 * math.pi / n) for name, n in zip(SHAPES, (3, 4, 5, 6, 8), strict=False)}
AREAS |= {"disc": math.pi * 0.9**2, "ring": math.pi * (0.96**2 - 0.48**2), "cross": 4 * 0.95 * 0.6 - 0.6**2}
AREAS |= {"star": 5 * 0.42 * math.sin(math.pi / 5), "bars": 3 * 1.5 * 0.36}  # of the unit circle's shapes
SMALLEST, LARGEST = LAYOUTS["single"].radius
MEAN_SQUARED_RADIUS = (LARGEST**3 - SMALLEST**3) / 3 / (LARGEST - SMALLEST)


def test_a_picture_depends_on_seed_and_index_only():
    together = render(3, range(20), 32, LAYOUTS["single"])
    for index in (0, 7, 19):
        alone = render(3, [index], 32, LAYOUTS["single"])
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[index], part[0])
    assert not torch.equal(render(4, [0], 32, LAYOUTS["single"]).image, together.image[:1])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), size=st.integers(24, 96), mode=st.sampled_from(["single", "scene"]))
def test_boxes_are_tight_on_masks(seed, size, mode):
    pictures = render(seed, range(8), size, LAYOUTS[mode])
    masks = object_masks(pictures.owner, pictures.shape.shape[1])
    for mask, box in zip(masks.flatten(0, 1), (pictures.boxes_xyxy * size).flatten(0, 1), strict=True):
        if mask.any():
            rows, columns = mask.nonzero().unbind(1)
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert (box - torch.stack(expected)).abs().max() < 1e-3
        else:
            assert box.abs().max() == 0
    assert (pictures.num_objects >= LAYOUTS[mode].fewest).all()
    assert (pictures.num_objects <= LAYOUTS[mode].most).all()


def test_batches():
    data = ShapesData(num_images=50, batch_size=10, bank_size=30, query_size=20)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (10, 3, 32, 32)
    bank, queries = data.val_dataloader()
    assert sum(len(part.label) for part in bank) == 30
    labels = torch.cat([part.label for part in queries])
    assert len(labels) == 20
    assert labels.max() < len(SHAPES)

    scenes = ShapesData("scene", num_images=20, image_size=48, batch_size=5, bank_size=10, query_size=5)
    scenes.setup("fit")
    batch = next(iter(scenes.train_dataloader()))
    assert batch.masks.shape == (5, 5, 48, 48)
    assert batch.boxes_xyxy.shape == (5, 5, 4)
    dense = next(iter(scenes.val_dataloader()[0]))
    assert dense.pixel_label.shape[1:] == (48, 48)
    assert dense.pixel_label.max() <= len(SHAPES)


def test_sample_is_the_picture_of_the_batch():
    data = ShapesData("scene", num_images=30, image_size=40, batch_size=30, query_size=5)
    batch, dense = data.parts.train.read(range(30)), data.parts.bank.read(range(30))
    for index in range(30):
        sample = data.sample(index)
        count = int(batch.num_objects[index])
        assert torch.equal(sample.image, batch.image[index])
        assert torch.equal(sample.boxes_xyxy, batch.boxes_xyxy[index, :count])
        assert torch.equal(sample.masks, batch.masks[index, :count])
        assert not batch.masks[index, count:].any()
        assert not batch.boxes_xyxy[index, count:].any()
        painted = torch.zeros(40, 40, dtype=torch.long)
        for mask, label in zip(sample.masks, sample.labels, strict=True):
            assert (painted[mask] == 0).all()  # masks do not overlap
            painted[mask] = label + 1
        assert torch.equal(dense.pixel_label[index], painted)
    assert not torch.equal(data.sample(10**6).image, data.sample(0).image)


@pytest.mark.parametrize("mode", ["single", "scene"])
def test_every_object_is_seen(mode):
    for size in (24, 40):
        pictures = render(0, range(2000), size, LAYOUTS[mode])
        seen = object_masks(pictures.owner, pictures.shape.shape[1]).flatten(2).any(2)
        assert torch.equal(seen.sum(1), pictures.num_objects)


def test_single_pictures_are_hard_for_raw_pixels():
    data = ShapesData(num_images=4000, query_size=1000, seed=0)
    bank, queries = (part.read(part.positions) for part in data.parts[1:3])
    assert bank.label.bincount(minlength=10).min() > 300
    known, asked = (F.normalize(part.image.flatten(1).float(), dim=1) for part in (bank, queries))
    nearest = (asked @ known.T).topk(20).indices
    accuracy = (bank.label[nearest].mode(1).values == queries.label).float().mean()
    assert 0.10 < accuracy < 0.19


def test_masks_have_the_area_of_their_shapes():
    pictures = render(0, range(4000), 48, LAYOUTS["single"])
    covered = (pictures.owner > 0).float().mean((1, 2))
    for kind, name in enumerate(SHAPES):
        measured = covered[pictures.shape[:, 0] == kind].mean() / MEAN_SQUARED_RADIUS
        assert measured == pytest.approx(AREAS[name], rel=0.12), name


def test_errors(unchecked):
    for arguments, message in (
        ({"mode": "other"}, "`mode` must be one of single, scene, got other"),
        ({"num_images": 0}, "`num_images` must be at least 1, got 0"),
        ({"image_size": 8}, "`image_size` must be at least 24, got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            ShapesData(**arguments)
