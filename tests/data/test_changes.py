"""Files that change between a stop and a resume."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lidar_trees import VERSION, write_kitti_object, write_nuscenes, write_semantic_kitti
from PIL import Image
from test_cli import TINY

from ssl_distill.cli import main
from ssl_distill.data import changes as module
from ssl_distill.data.changes import changes, fingerprint
from ssl_distill.data.coco_objects import CocoObjectsData
from ssl_distill.data.image_folder import ImageFolderData
from ssl_distill.lidar.data import MixedLidarData
from ssl_distill.lidar.kitti_data import KITTIObjectData, SemanticKITTIData
from ssl_distill.lidar.nuscenes_data import NuScenesData
from ssl_distill.lidar.street import render_scene


def picture(path, seed=0, size=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pictures(tmp_path):
    for number in range(32):
        picture(tmp_path / "pictures" / f"{number:02d}.png", number)
    return tmp_path / "pictures"


def files_of(data):
    data.setup("fit")
    return data.training_files


def test_what_has_changed(pictures):
    before = fingerprint(*files_of(ImageFolderData(str(pictures), batch_size=4)))
    again = files_of(ImageFolderData(str(pictures), batch_size=4))
    assert changes(before, fingerprint(*again), again[0]) == ""

    (pictures / "03.png").unlink()
    (pictures / "04.png").unlink()
    picture(pictures / "x\ny.png")
    picture(pictures / "05.png", size=16)
    status = (pictures / "06.png").stat()
    os.utime(pictures / "06.png", (status.st_atime, status.st_mtime + 5))
    names, files = files_of(ImageFolderData(str(pictures), batch_size=4))
    said = changes(before, fingerprint(names, files), names)
    assert said == "1 added, such as x\\ny.png; 2 removed; 2 replaced (another size or time), such as 05.png"


def test_where_they_lie_does_not_count(pictures):
    before = fingerprint(*files_of(ImageFolderData(str(pictures), batch_size=4)))
    moved = pictures.rename(pictures.with_name("elsewhere"))
    assert torch.equal(before, fingerprint(*files_of(ImageFolderData(str(moved), batch_size=4))))


def test_tars_and_annotations(pictures, tmp_path):
    def pack():
        with tarfile.open(tmp_path / "shard.tar", "w") as tar:
            for path in sorted(pictures.iterdir()):
                tar.add(path, path.name)

    def annotate(category):
        images = [
            {"id": i, "file_name": path.name, "height": 32, "width": 32}
            for i, path in enumerate(sorted(pictures.iterdir()))
        ]
        objects = [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}
            for i in range(len(images))
        ]
        content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": category}]}
        (tmp_path / "objects.json").write_text(json.dumps(content))

    pack()
    annotate("thing")
    sources = {
        "shard.tar": lambda: ImageFolderData(str(tmp_path / "shard.tar"), batch_size=4),
        "annotations": lambda: CocoObjectsData(str(pictures), str(tmp_path / "objects.json"), batch_size=4),
    }
    before = {name: fingerprint(*files_of(make())) for name, make in sources.items()}
    picture(pictures / "00.png", size=48)
    pack()
    annotate("another")
    os.utime(tmp_path / "shard.tar", (0, 0))
    said = {}
    for name, make in sources.items():
        names, files = files_of(make())
        said[name] = changes(before[name], fingerprint(names, files), names)
    assert said["shard.tar"] == "32 replaced (another size or time), such as shard.tar/00.png"
    assert said["annotations"] == "2 replaced (another size or time), such as annotations"


def test_lidar_frames(tmp_path):
    streets = [render_scene(0, number, (0, 90)).frame for number in range(3)]
    write_semantic_kitti(tmp_path / "kitti", streets)
    write_kitti_object(tmp_path / "object", streets)
    write_nuscenes(tmp_path / "nuscenes", streets, scenes=("scene-0061", "scene-0103"))

    def make():
        kitti = SemanticKITTIData(str(tmp_path / "kitti"), train_sequences=("00",), val_sequences=("00",), batch_size=1)
        objects = KITTIObjectData(str(tmp_path / "object"), batch_size=1)
        return MixedLidarData([kitti, objects, NuScenesData(str(tmp_path / "nuscenes"), VERSION)], batch_size=1)

    before = fingerprint(*files_of(make()))
    next((tmp_path / "kitti").rglob("00/velodyne/000001.bin")).unlink()
    for name in ("object/training/velodyne/000002.bin", f"nuscenes/{VERSION}/sample.json"):
        os.utime(tmp_path / name, (0, 0))
    names, files = files_of(make())
    said = changes(before, fingerprint(names, files), names)
    assert said == "1 removed; 2 replaced (another size or time), such as 1/training/velodyne/000002.bin"


def test_many_files_are_looked_at_in_part(tmp_path, monkeypatch):
    looked_at = []
    monkeypatch.setattr(module, "_stamp", lambda file: looked_at.append(file) or 7)
    monkeypatch.setattr(module, "_MOST_LOOKED_AT", 100)
    names = [f"{number}.png" for number in range(1000)]
    before = fingerprint(names, names)
    assert 50 < len(looked_at) < 200
    fewer = names[:500]  # others of them are looked at
    assert changes(before, fingerprint(fewer, fewer), fewer) == "500 removed"
    monkeypatch.setattr(module, "_stamp", lambda file: 8)
    assert "replaced" in changes(before, fingerprint(names, names), names)


@pytest.mark.parametrize(
    ("act", "said", "steps"),
    [
        (lambda folder: None, None, 16),
        (lambda folder: picture(folder / "new.png"), "1 added, such as new.png", 16),
        (lambda folder: [path.unlink() for path in sorted(folder.iterdir())[8:]], "24 removed", 7),
    ],
)
def test_a_run_goes_on_with_the_files_as_they_are(pictures, tmp_path, monkeypatch, act, said, steps):
    """It was stopped within its first epoch: with too few files for what it has seen, that epoch is over."""
    monkeypatch.chdir(tmp_path)
    data = {"class_path": "ssl_distill.data.image_folder.ImageFolderData",
            "init_args": {"root": str(pictures), "batch_size": 4, "num_workers": 0, "eval_size": 32}}  # fmt: skip
    trainer = {**TINY["trainer"], "limit_val_batches": 0}
    Path("folder.yaml").write_text(yaml.safe_dump({"trainer": trainer, "model": TINY["model"], "data": data}))
    ask = {"class_path": "test_stop.AskIn", "init_args": {"hook": "on_train_batch_start", "number": 15, "step": 4}}
    with pytest.raises(SystemExit):
        main(["fit", "-c", "folder.yaml", "--trainer.callbacks+", json.dumps(ask)])
    act(pictures)
    again = ["fit", "-c", "folder.yaml", "--ckpt_path", "last"]
    if said is None:
        assert main(again) == 0
    else:
        with pytest.warns(UserWarning, match="have changed since the checkpoint: ") as warned:
            assert main(again) == 0
        assert any(f"checkpoint: {said}. The run goes on" in str(each.message) for each in warned)
    assert torch.load("runs/dino/last.ckpt", weights_only=True)["global_step"] == steps
