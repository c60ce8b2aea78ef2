"""Frames in shards give what the data sets give that they were made of."""

import json

import numpy as np
import pytest
import torch
from lidar_trees import VERSION, write_kitti_object, write_nuscenes, write_semantic_kitti
from PIL import Image

from ssl_distill.cli import main
from ssl_distill.lidar.data import MixedLidarData
from ssl_distill.lidar.frames import EncodedImage
from ssl_distill.lidar.kitti_data import KITTIObjectData, SemanticKITTIData
from ssl_distill.lidar.nuscenes_data import NuScenesData
from ssl_distill.lidar.samples import LabelledSamples, PairedSamples
from ssl_distill.lidar.shards_data import LidarShardsData, optimize_frames, pack_frame, unpack_frame
from ssl_distill.lidar.street import render_scene
from ssl_distill.lidar.street_data import StreetFrames, SynthStreetData

READER = "ssl_distill.lidar.shards_data.LidarShardsData"
SIZES = {"batch_size": 1, "eval_batch_size": 2, "seed": 3}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    frames = [render_scene(0, i, (0, 90)).frame for i in range(4)]
    write_nuscenes(root / "nuscenes", frames, scenes=("scene-0061", "scene-0103"))
    write_semantic_kitti(root / "kitti", frames[:2])
    write_semantic_kitti(root / "kitti", frames[2:], sequence="08")
    return root


def street(**kwargs):
    sizes = {"num_scenes": 4, "bank_size": 3, "query_size": 2, "batch_size": 2, "eval_batch_size": 2, "seed": 3}
    return SynthStreetData(**{**sizes, **kwargs})


def nuscenes(trees, **kwargs):
    return NuScenesData(str(trees / "nuscenes"), VERSION, **SIZES, **{"num_workers": 0, **kwargs})


def kitti(trees, **kwargs):
    return SemanticKITTIData(str(trees / "kitti"), **SIZES, **{"num_workers": 0, **kwargs})


def mixed(trees, **kwargs):
    return MixedLidarData([kitti(trees), nuscenes(trees)], **SIZES, **{"num_workers": 0, **kwargs})


def shards_of(data, output):
    pytest.importorskip("litdata")
    optimize_frames(data, output, frames_per_shard=2)
    return output


def reader(data, root, **kwargs):
    """Shards read as another module reads its own."""
    same = ("samples", "preparation", "batch_size", "eval_batch_size", "seed")
    return LidarShardsData(str(root), **{**{name: getattr(data, name) for name in same}, "num_workers": 0, **kwargs})


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if first is None:
        return second is None
    return all(equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("make", "num_frames", "num_shards"),
    [(lambda trees, **kwargs: street(**kwargs), 6, 3), (nuscenes, 4, 2), (kitti, 4, 2), (mixed, 6, 3)],
    ids=["street", "nuscenes", "kitti", "mixed"],
)
@pytest.mark.parametrize("samples", [PairedSamples((60, 100)), LabelledSamples()])
def test_shards_give_the_modules_batches(make, num_frames, num_shards, samples, trees, tmp_path):
    theirs = make(trees, samples=samples)
    ours = reader(theirs, shards_of(theirs, tmp_path / "shards"), num_workers=2)
    assert json.loads((tmp_path / "shards/frames.json").read_text())["num_frames"] == num_frames  # each once
    assert len(list((tmp_path / "shards").glob("*.bin"))) == num_shards
    loaders = [ours.train_dataloader(), theirs.train_dataloader()]
    for epoch in (0, 1):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        assert equal(*map(list, loaders))
    assert equal(
        [list(loader) for loader in ours.val_dataloader()], [list(loader) for loader in theirs.val_dataloader()]
    )
    assert len(list(loaders[0])) == len(theirs.parts.train) // theirs.batch_size
    assert list(map(len, ours.parts)) == list(map(len, theirs.parts))
    assert ours.class_names == theirs.class_names


def test_sizes_of_evaluation(tmp_path):
    """They are the module's, and can be larger where it has more."""
    data = street()
    root = shards_of(data, tmp_path / "shards")
    assert [len(part) for part in reader(data, root).parts] == [4, 3, 2]
    assert [len(part) for part in reader(data, root, bank_size=9, query_size=1).parts] == [4, 4, 1]


def test_without_labels(tmp_path):
    write_kitti_object(tmp_path, [render_scene(0, i, (0,)).frame for i in range(2)])
    data = KITTIObjectData(str(tmp_path), batch_size=1, num_workers=0, seed=0)
    ours = reader(data, shards_of(data, tmp_path / "shards"))
    assert ours.num_classes is None
    assert ours.val_dataloader() == []
    assert equal(list(ours.train_dataloader()), list(data.train_dataloader()))


def test_a_run_goes_on_in_mid_epoch_and_ranks_share_it(tmp_path, monkeypatch):
    theirs = street()
    root = shards_of(theirs, tmp_path / "shards")
    data = reader(theirs, root)
    whole = list(data.train_dataloader())
    dataset = data.training_set()
    sampler = data._sampler(dataset)
    sampler.resume_at(0, 1)
    assert equal(list(data._loader(dataset, 2, sampler)), whole[1:])
    ranks = []
    for rank in range(2):
        monkeypatch.setattr("ssl_distill.lidar.data.world_size", lambda: 2)
        monkeypatch.setattr("ssl_distill.lidar.data.rank", lambda rank=rank: rank)
        ranks.append(list(reader(theirs, root, batch_size=1).train_dataloader()))
    assert equal([data.samples.join(pair) for pair in zip(*ranks, strict=True)], whole)


def test_a_frame_comes_back_to_the_bit(tmp_path):
    frame = render_scene(0, 0, (0, 90)).frame
    file = tmp_path / "a.jpg"
    Image.fromarray(frame.cameras[0].image).save(file)
    cameras = (frame.cameras[0]._replace(image=file), frame.cameras[1])
    strided = np.asfortranarray(frame.points[::-1])  # neither in order in memory nor forward
    original = frame._replace(points=strided, labels=frame.labels.astype(np.uint8), cameras=cameras)
    again = unpack_frame(pack_frame(original), "shards")
    np.testing.assert_array_equal(again.points, strided, strict=True)
    np.testing.assert_array_equal(again.labels, original.labels, strict=True)
    assert again.points.flags.writeable
    assert (again.frame_id, again.sensor) == (frame.frame_id, frame.sensor)
    assert again.cameras[0].image.content == file.read_bytes()
    for ours, theirs in zip(again.cameras, cameras, strict=True):
        assert ours.name == theirs.name
        np.testing.assert_array_equal(ours.pixels(), theirs.pixels(), strict=True)
        np.testing.assert_array_equal(ours.cam_from_lidar, theirs.cam_from_lidar, strict=True)
        np.testing.assert_array_equal(ours.intrinsics, theirs.intrinsics, strict=True)
    assert pack_frame(again) == pack_frame(unpack_frame(pack_frame(again), "elsewhere"))  # shards of shards
    bare = unpack_frame(pack_frame(frame._replace(labels=None, cameras=())), "shards")
    assert bare.labels is None
    assert bare.cameras == ()
    damaged = again.cameras[0]._replace(image=EncodedImage(b"no image", again.cameras[0].image.name))
    with pytest.raises(OSError, match=rf"cannot read shards:{frame.frame_id}:camera_0: it is no image"):
        damaged.pixels()


def test_an_interrupted_command_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("litdata")
    output = tmp_path / "shards"
    load = StreetFrames._load
    monkeypatch.setattr(StreetFrames, "_load", lambda self, number: load(self, number) if number != 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimize_frames(street(), output, frames_per_shard=2)
    with pytest.raises(ValueError, match="must be a folder of finished shards"):
        LidarShardsData(str(output))
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.bin")}
    assert len(before) == 1
    monkeypatch.setattr(StreetFrames, "_load", load)
    for other in (street(seed=4), street(num_scenes=5), street(bank_size=1)):
        with pytest.raises(ValueError, match="shards of other data or of another size"):
            optimize_frames(other, output, frames_per_shard=2)
    assert optimize_frames(street(), output, frames_per_shard=2) == 6
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("*.bin")}
    assert len(after) == 3
    assert before.items() <= after.items()  # what was done is not done again
    assert {path.name for path in output.iterdir()} == {*after, "index.json", "frames.json"}


@pytest.mark.filterwarnings("ignore:`learning_rate` warms up")  # a run of one step
def test_the_commands(tmp_path, monkeypatch, capsys):
    pytest.importorskip("litdata")
    config = str(tmp_path / "street.yaml")
    (tmp_path / "street.yaml").write_text(
        "seed_everything: 7\n"
        "trainer: {accelerator: cpu, devices: 1, max_epochs: 1, enable_progress_bar: false}\n"
        "model:\n  class_path: ssl_distill.methods.scalr.ScaLR\n  init_args:\n    backbone:\n"
        "      class_path: ssl_distill.lidar.waffleiron.WaffleIron\n"
        "      init_args: {grids: [[64, 64], [64, 24], [64, 24]], channels: 8, depth: 2}\n"
        "    teacher: {class_path: ssl_distill.lidar.teachers.PatchStats}\n"
        "    evaluation: {class_path: ssl_distill.lidar.point_evaluation.PointEvaluation,"
        " init_args: {steps: 2, calibration_batches: 1}}\n"
        "data:\n  class_path: ssl_distill.lidar.street_data.SynthStreetData\n  init_args:\n"
        "    preparation: {grids: [[64, 64], [64, 24], [64, 24]], fov_min: [-32, -32, -4], fov_max: [32, 32, 8]}\n"
        "    num_scenes: 9\n    batch_size: 2\n    bank_size: 1\n    query_size: 1\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["data", "optimize", config, "shards", "--workers", "0", "--data.init_args.num_scenes", "2"]
    assert main(command) == 0
    assert f"3 frames in shards; train on them with\n  --data {READER}" in capsys.readouterr().out
    assert LidarShardsData("shards").parts.train[1].frame_id == "street_7_1"  # of the config's seed
    reading = ["--data", READER, "--data.init_args.root", "shards", "--data.init_args.num_workers", "0"]
    assert main(["fit", "-c", config, *reading, "--trainer.fast_dev_run", "1"]) == 0
    (tmp_path / "bare.yaml").write_text("trainer: {max_epochs: 1}\n")
    (tmp_path / "torn.yaml").write_text("data: [1\n")
    for args, message in (
        ([config, "shards"], "`OUT` shards holds shards already"),
        (["gone.yaml", "x"], "No such file or directory: 'gone.yaml'"),
        ([config, "x", "--data.init_args.num_scene", "1"], "`data.init_args.num_scene` is no argument of"),
        ([config, "x", "--items-per-shard", "0"], "`--items-per-shard` must be at least 1, got 0"),
        ([config, "x", "--data", "ssl_distill.data.shapes.ShapesData"], "not correspond to a subclass of LidarData"),
        (["bare.yaml", "x"], "`DIR` bare.yaml must be a folder, or a config with a section `data`"),
        (["torn.yaml", "x"], "torn.yaml is no YAML of plain values: expected"),
    ):
        assert main(["data", "optimize", *args]) == 2
        assert message in capsys.readouterr().err


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"`root` must be a folder of finished shards, nowhere is none; make them"):
        LidarShardsData("nowhere")
    with pytest.raises(ValueError, match=r"`root` must be a folder of finished shards, .* holds none; make them"):
        LidarShardsData(str(tmp_path))
    spec = [1, {"type": "builtins.dict", "context": "[]", "children_spec": []}]
    index = {
        "chunks": [{"chunk_size": 2, "chunk_bytes": 5, "filename": "chunk-0-0.bin"}],
        "config": {"data_format": [], "data_spec": json.dumps(spec)},
    }
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "chunk-0-0.bin").write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"holds shards without frames.json, so not of lidar frames"):
        LidarShardsData(str(tmp_path))
    facts = {"num_frames": 3, "bank_size": 1, "query_size": 1, "class_names": []}
    facts |= {"train": [0], "bank": None, "queries": None}
    (tmp_path / "frames.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"holds 2 items, its frames.json 3; make the shards again"):
        LidarShardsData(str(tmp_path))
    (tmp_path / "frames.json").write_text(json.dumps({**facts, "num_frames": 2}))
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        LidarShardsData(str(tmp_path), batch_size=0)
