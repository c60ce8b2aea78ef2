import json

import numpy as np
import pytest
from lidar_trees import VERSION, write_kitti_object, write_nuscenes, write_semantic_kitti

from ssl_distill.lidar.frames import Sensor
from ssl_distill.lidar.kitti_data import KITTIObjectData, SemanticKITTIData
from ssl_distill.lidar.nuscenes import CLASSES as NUSCENES_CLASSES
from ssl_distill.lidar.nuscenes import NuScenes, scene_names
from ssl_distill.lidar.nuscenes_data import NuScenesData
from ssl_distill.lidar.projection import pair_with_pixels
from ssl_distill.lidar.semantic_kitti import CLASSES as KITTI_CLASSES
from ssl_distill.lidar.semantic_kitti import KITTIObject, SemanticKITTI
from ssl_distill.lidar.street import IMAGE_SIZE, SENSOR, render_scene

SCENES = ("scene-0061",)


@pytest.fixture(scope="module")
def streets():
    return [render_scene(0, i, (0, 90)).frame for i in range(3)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_DISTILL_CACHE", str(tmp_path / "cache"))


def check(frame, street, cameras=2):
    np.testing.assert_array_equal(frame.points, street.points)
    np.testing.assert_array_equal(frame.labels, street.labels)
    assert len(frame.cameras) == cameras
    for camera in frame.cameras:
        original = next(each for each in street.cameras if camera.name in (each.name, "image_2"))
        np.testing.assert_allclose(camera.cam_from_lidar, original.cam_from_lidar, rtol=0, atol=1e-9)
        np.testing.assert_allclose(camera.intrinsics, original.intrinsics, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(camera.pixels(), original.image)
        ours = pair_with_pixels(frame.points, camera, IMAGE_SIZE, SENSOR)
        theirs = pair_with_pixels(street.points, original, IMAGE_SIZE, SENSOR)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_nuscenes_round_trip(streets, tmp_path):
    write_nuscenes(tmp_path, streets)
    frames = NuScenes(tmp_path, SCENES, VERSION)
    assert len(frames) == 3
    for i, street in enumerate(streets):
        check(frames[i], street)
        assert frames[i].sensor.margin == 1
        assert frames[i].sensor.min_depth == 1


def test_nuscenes_index_is_cached(streets, tmp_path, monkeypatch):
    write_nuscenes(tmp_path, streets)
    NuScenes(tmp_path, SCENES, VERSION)
    monkeypatch.setattr("json.loads", lambda text: pytest.fail("the tables were read again"))
    check(NuScenes(tmp_path, SCENES, VERSION)[1], streets[1])
    monkeypatch.undo()
    write_nuscenes(tmp_path, streets[:2])  # another size: the index is made anew
    assert len(NuScenes(tmp_path, SCENES, VERSION)) == 2


def test_nuscenes_scenes(streets, tmp_path):
    write_nuscenes(tmp_path, streets, scenes=("scene-0061", "scene-0103"))
    assert [len(NuScenes(tmp_path, scene_names(split, VERSION), VERSION)) for split in ("train", "val")] == [2, 1]
    with pytest.raises(
        ValueError, match=r"no key frame of the 1 scenes looked for \(scene-9999\).* has 2 \(scene-0061"
    ):
        NuScenes(tmp_path, ["scene-9999"], VERSION)
    (tmp_path / "mine.txt").write_text("scene-0103\n")
    assert scene_names("val", "v1.0-trainval", tmp_path / "mine.txt") == ["scene-0103"]
    with pytest.raises(ValueError, match="`val_scenes` must be a text file"):
        scene_names("val", "v1.0-trainval", tmp_path / "nothing.txt")
    data = NuScenesData(str(tmp_path), VERSION)
    data.setup("validate")
    assert [len(part) for part in data.parts] == [2, 2, 1]
    assert data.class_names == tuple(NUSCENES_CLASSES)


def test_unlabelled_works(streets, tmp_path):
    write_nuscenes(tmp_path / "nu", streets, lidarseg=False)
    frame = NuScenes(tmp_path / "nu", SCENES, VERSION)[0]
    assert frame.labels is None
    data = NuScenesData(str(tmp_path / "nu"), VERSION, batch_size=2, num_workers=0)
    data.setup("fit")
    assert data.val_dataloader() == []
    assert data.num_classes is None
    batch = next(iter(data.train_dataloader()))
    assert len(batch.points.num_points) == 2
    write_semantic_kitti(tmp_path / "kitti", streets, labels=False)
    assert SemanticKITTI(tmp_path / "kitti")[0].labels is None
    assert SemanticKITTIData(str(tmp_path / "kitti"), num_workers=0).val_dataloader() == []


def test_semantic_kitti_round_trip(streets, tmp_path):
    folder = write_semantic_kitti(tmp_path, streets)
    frames = SemanticKITTI(tmp_path)
    assert len(frames) == 3
    for i, street in enumerate(streets):
        check(frames[i], street, cameras=1)
    assert frames[0].sensor == Sensor(0.28613698, 0.14090556, None, 1.0, 1.0)
    assert len(SemanticKITTI(tmp_path, every=2)) == 2
    # The layout that ScaLR's published code reads, and the one without `dataset`.
    moved = tmp_path / "calib/dataset/sequences/00"
    moved.mkdir(parents=True)
    (folder / "calib.txt").rename(moved / "calib.txt")
    check(SemanticKITTI(tmp_path)[0], streets[0], cameras=1)
    (tmp_path / "dataset/sequences").rename(tmp_path / "sequences")
    check(SemanticKITTI(tmp_path)[2], streets[2], cameras=1)


def test_kitti_without_pictures_serves_a_probe(streets, tmp_path):
    folder = write_semantic_kitti(tmp_path, streets)
    (folder / "image_2").rename(folder / "elsewhere")
    (folder / "calib.txt").unlink()
    assert SemanticKITTI(tmp_path)[0].cameras == ()


def test_kitti_object_round_trip(streets, tmp_path):
    write_kitti_object(tmp_path, streets)
    frames = KITTIObject(tmp_path)
    for i, street in enumerate(streets):
        check(frames[i]._replace(labels=street.labels), street, cameras=1)
    data = KITTIObjectData(str(tmp_path), batch_size=3, num_workers=0)
    data.setup("fit")
    assert next(iter(data.train_dataloader())).images.shape[0] == 3
    assert data.val_dataloader() == []


def test_label_maps():
    """Every class once, counted against the data sets' own lists."""
    assert len(KITTI_CLASSES) == 19
    assert len(NUSCENES_CLASSES) == 16
    raw = [number for numbers in KITTI_CLASSES.values() for number in numbers]
    assert len(raw) == len(set(raw)) == 30
    assert {0, 1, 52, 99}.isdisjoint(raw)


def break_nuscenes(root, what):
    if what == "cut points":
        file = root / "samples/LIDAR_TOP/0.pcd.bin"
        file.write_bytes(file.read_bytes()[:-4])
    elif what == "few labels":
        file = root / f"lidarseg/{VERSION}/lidar-0_lidarseg.bin"
        file.write_bytes(file.read_bytes()[:-1])
    elif what == "no camera":
        edit(root, "sample_data", lambda rows: [row for row in rows if row["token"] != "camera_90-1"])
    elif what == "no picture":
        (root / "samples/camera_0/0.png").unlink()
    elif what == "quaternion":
        edit(root, "ego_pose", lambda rows: [{**row, "rotation": [2 * q for q in row["rotation"]]} for row in rows])
    elif what == "no table":
        (root / VERSION / "ego_pose.json").unlink()
    elif what == "resized":
        scaled = lambda k: (np.array(k) * 2).tolist()  # noqa: E731
        edit(
            root,
            "calibrated_sensor",
            lambda rows: [{**r, "camera_intrinsic": scaled(r["camera_intrinsic"])} for r in rows],
        )


def edit(root, table, change):
    path = root / VERSION / f"{table}.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("cut points", ValueError, r"0\.pcd\.bin has \d+ bytes, no multiple of 20 \(5 numbers per point\)"),
        ("few labels", ValueError, r"lidar-0_lidarseg.bin has labels for \d+ points, its scan has \d+"),
        ("no camera", ValueError, "sample sample-1 in .* has no key frame of camera_90"),
        ("no picture", OSError, "cannot read .*camera_0/0.png"),
        ("quaternion", ValueError, "`quaternion_wxyz` must have norm 1, got 2"),
        ("no table", ValueError, "ego_pose.json does not exist"),
        ("resized", ValueError, "`intrinsics` of camera_0 must be those of its image, 192 x 96"),
    ],
)
def test_nuscenes_errors(streets, tmp_path, what, error, message):
    write_nuscenes(tmp_path, streets)
    break_nuscenes(tmp_path, what)
    with pytest.raises(error, match=message):
        NuScenes(tmp_path, SCENES, VERSION)[0].cameras[0].pixels()


def test_rounded_quaternions_are_taken(streets, tmp_path):
    write_nuscenes(tmp_path, streets)
    edit(tmp_path, "ego_pose", lambda rows: [{**row, "rotation": [1.01 * q for q in row["rotation"]]} for row in rows])
    check(NuScenes(tmp_path, SCENES, VERSION)[0], streets[0])


def break_kitti(root, folder, what):
    if what == "cut points":
        (folder / "velodyne/000000.bin").write_bytes(b"12345678")
    elif what == "few labels":
        (folder / "labels/000000.label").write_bytes(b"1234")
    elif what == "no calibration":
        (folder / "calib.txt").unlink()
    elif what == "half a calibration":
        (folder / "calib.txt").write_text("P0: 1 2 3\n")
    elif what == "no sequences":
        (root / "dataset").rename(root / "data")
    elif what == "no scans":
        (folder / "velodyne").rename(folder / "points")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("cut points", r"000000.bin has 8 bytes, no multiple of 16 \(4 numbers per point\)"),
        ("few labels", r"000000.label has labels for 1 points, its scan has \d+"),
        ("no calibration", r"sequence 00 has pictures and no calibration; looked for .*/00/calib.txt and .*/calib/"),
        ("half a calibration", "the calibration .*calib.txt lacks P2 and Tr; it has P0"),
        ("no sequences", "`root` must hold the sequences of KITTI, but neither"),
        ("no scans", "has no scans; looked for .*/SS/velodyne/"),
    ],
)
def test_semantic_kitti_errors(streets, tmp_path, what, message):
    break_kitti(tmp_path, write_semantic_kitti(tmp_path, streets), what)
    with pytest.raises(ValueError, match=message):
        SemanticKITTI(tmp_path)[0]


def test_other_errors(streets, tmp_path):
    with pytest.raises(ValueError, match="`root` must hold KITTI's object data"):
        KITTIObject(tmp_path)
    with pytest.raises(ValueError, match="`root` must hold the tables of nuScenes"):
        NuScenes(tmp_path, SCENES)
    folder = write_kitti_object(tmp_path, streets)
    (folder / "calib/000001.txt").unlink()
    with pytest.raises(ValueError, match=r"the calibration .*000001.txt is missing"):
        KITTIObject(tmp_path)[1]
    write_semantic_kitti(tmp_path, streets)
    with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
        SemanticKITTI(tmp_path, every=0)
    with pytest.raises(ValueError, match="`train_every` must be at least 1, got 0"):
        NuScenesData(str(tmp_path), train_every=0)
