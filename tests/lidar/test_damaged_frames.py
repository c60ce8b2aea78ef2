"""A frame that cannot be read is named once, counted and replaced, whatever of it is damaged."""

import logging
import os
import re

import numpy as np
import pytest
import torch
from lidar_trees import VERSION, write_kitti_object, write_nuscenes, write_semantic_kitti

from ssl_distill.lidar.kitti_data import KITTIObjectData, SemanticKITTIData
from ssl_distill.lidar.nuscenes_data import NuScenesData
from ssl_distill.lidar.shards_data import LidarShardsData, optimize_frames
from ssl_distill.lidar.street import render_scene
from ssl_distill.lidar.street_data import SynthStreetData


@pytest.fixture(scope="module")
def streets():
    frames = [render_scene(0, i, (0, 90)).frame for i in range(3)]
    return [frame._replace(points=frame.points[::4], labels=frame.labels[::4]) for frame in frames]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_DISTILL_CACHE", str(tmp_path / "cache"))


def options(**kwargs):
    return {"preparation": SynthStreetData(1).preparation, "batch_size": 3, "num_workers": 0, "seed": 0, **kwargs}


def semantic_kitti(root, streets):
    write_semantic_kitti(root, streets)
    write_semantic_kitti(root, streets, sequence="08")
    folder = root / "dataset/sequences/00"
    files = {
        "scan": folder / "velodyne/000001.bin",
        "labels": folder / "labels/000001.label",
        "picture": folder / "image_2/000001.png",
    }
    return files, lambda **kwargs: SemanticKITTIData(str(root), train_sequences=("00",), **options(**kwargs))


def kitti_object(root, streets):
    folder = write_kitti_object(root, streets)
    files = {"scan": folder / "velodyne/000001.bin", "calibration": folder / "calib/000001.txt"}
    return files, lambda **kwargs: KITTIObjectData(str(root), **options(**kwargs))


def nuscenes(root, streets):
    write_nuscenes(root, [*streets, *streets], scenes=("scene-0061", "scene-0103"))
    files = {
        "scan": root / "samples/LIDAR_TOP/2.pcd.bin",
        "labels": root / f"lidarseg/{VERSION}/lidar-2_lidarseg.bin",
    }
    return files, lambda **kwargs: NuScenesData(str(root), VERSION, **options(**kwargs))


CASES = [
    (semantic_kitti, "scan"),
    (semantic_kitti, "labels"),
    (semantic_kitti, "picture"),
    (kitti_object, "scan"),
    (kitti_object, "calibration"),
    (nuscenes, "scan"),
    (nuscenes, "labels"),
]


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 | 1])  # an odd number: no whole record


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(("write", "what"), CASES)
@pytest.mark.parametrize("damage", [cut, pipe])
def test_it_is_named_counted_and_replaced(write, what, damage, streets, tmp_path, caplog):
    files, data = write(tmp_path, streets)
    damage(files[what])
    dataset = data().training_set()
    with caplog.at_level(logging.WARNING):
        batches = [dataset.__getitems__([3 * epoch, 3 * epoch + 1, 3 * epoch + 2]) for epoch in range(2)]
    assert [len(batch.picture) for batch in batches] == [3, 3]
    assert batches[0].picture[1] == batches[0].picture[2]
    assert int(dataset.replacement.corrupt.sum()) == 1
    (message,) = caplog.messages
    assert re.search(r"corrupt: 1 of 3 frames so far: .*" + re.escape(str(files[what])), message)
    assert [len(batch.index) for loader in data().val_dataloader() for batch in loader] in ([], [3, 3])
    with pytest.raises(OSError, match=r"remove it or set `on_corrupt` to skip"):
        data(on_corrupt="error").training_set().__getitems__([0, 1, 2])


def test_loader_processes_count_together(streets, tmp_path):
    files, data = semantic_kitti(tmp_path, streets)
    cut(files["scan"])
    loader = data(num_workers=2, batch_size=1).train_dataloader()
    assert len([*loader, *loader]) == 6
    assert int(loader.dataset.replacement.corrupt.sum()) == 1


def test_points_that_no_lidar_saw(streets, tmp_path):
    files, data = semantic_kitti(tmp_path, streets)
    points = np.fromfile(files["scan"], "<f4")
    for number in (np.nan, np.inf, -3e38):
        points[5] = number
        points.tofile(files["scan"])
        with pytest.raises(OSError, match=r"000001.bin has 1 of \d+ points that are not finite or beyond 10,000"):
            data(on_corrupt="error").training_set()[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("P2: a b c\n", r"000001.txt must be lines of a name and numbers: could not convert"),
        ("P2: 1 2 3\nR0_rect: 1\nTr_velo_to_cam: 1\n", r"P2 in .*000001.txt must be 12 numbers below 1,000,000, got 3"),
        ("P2: 0 0 0 0 0 0 0 0 0 0 0 0\n", "lacks Tr_velo_to_cam and R0_rect"),
        (
            f"P2: {'0 ' * 12}\nR0_rect: {'0 ' * 9}\nTr_velo_to_cam: {'0 ' * 12}\n",
            r"P2 in .* must have focal lengths above 0 and end with 0 0 1, got \[0.0, 0.0\]",
        ),
        (f"P2: {'nan ' * 12}\nR0_rect: {'0 ' * 9}\nTr_velo_to_cam: {'0 ' * 12}\n", "must be 12 numbers below"),
    ],
)
def test_calibrations(text, message, streets, tmp_path):
    files, data = kitti_object(tmp_path, streets)
    files["calibration"].write_text(text)
    with pytest.raises(OSError, match=message):
        data(on_corrupt="error").training_set()[1]


def test_a_damaged_frame_in_a_shard(streets, tmp_path, caplog):
    pytest.importorskip("litdata")
    _, data = kitti_object(tmp_path / "kitti", streets)
    optimize_frames(data(), tmp_path / "shards", frames_per_shard=1)
    chunk = tmp_path / "shards/chunk-0-1.bin"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:100] + bytes(300) + whole[400:])
    dataset = LidarShardsData(str(tmp_path / "shards"), **options()).training_set()
    batch = dataset.__getitems__([0, 1, 2])
    assert torch.equal(batch.picture[1], batch.picture[2])
    assert "corrupt: 1 of 3 frames so far: cannot read" in caplog.text
    chunk.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"chunk-0-1.bin has \d+ bytes, index.json says \d+"):
        LidarShardsData(str(tmp_path / "shards"))
