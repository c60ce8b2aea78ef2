import numpy as np
import pytest
import torch

from ssl_distill.draws import Draws
from ssl_distill.lidar.augment_points import PointDraws, augmented, augmented_apart
from ssl_distill.lidar.batch import pad_clouds
from ssl_distill.lidar.frames import Camera, LidarCameraFrame, Sensor
from ssl_distill.lidar.preparation import (
    Preparation,
    cell_indices,
    feature_columns,
    first_per_voxel,
    inside_view,
    nearest_kept,
    nearest_neighbors,
    nearest_to,
)
from ssl_distill.lidar.projection import inverse_pose, pair_with_pixels, pose
from ssl_distill.lidar.samples import (
    LabelledSamples,
    PairedSamples,
    SampleDraws,
    evaluation_scan,
    join_scans,
    resized,
    sample_draws,
)


def arrays(case):
    return {name: value.numpy() for name, value in case.tensors.items()}


def sensor_of(params):
    return Sensor(params["mean_intensity"], params["std_intensity"])


def preparation_of(p, **kwargs):
    return Preparation(p["grids"], p["fov_min"], p["fov_max"], p["voxel_size"], p["num_neighbors"], **kwargs)


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def point_draws(row):
    """Of a golden row: rotation(, feature rotation), flip, axis or -1, scale."""
    rotation, *feature_rotation, flip, axis, scale = row.tolist()
    return PointDraws(rotation, *(feature_rotation or [0.0]), flip, max(axis, 0) / 2 + 0.25, scale)


def test_golden_knn(golden):
    case = golden("waffleiron/knn")
    t = arrays(case)
    np.testing.assert_array_equal(nearest_neighbors(t["points"], case.params["k"]), t["neighbors"])
    np.testing.assert_array_equal(nearest_kept(t["points"], t["query_points"]), t["nearest"])


def test_golden_reductions(golden):
    case = golden("scalr/limit_crop_voxel")
    t, p = arrays(case), case.params
    points = t["points"]
    center = points[int(t["limit_center_index"]), :3]
    np.testing.assert_array_equal(nearest_to(points, center, p["max_points"]), t["limit_indices_center"])
    origin = np.zeros(3, points.dtype)
    np.testing.assert_array_equal(nearest_to(points, origin, p["max_points"]), t["limit_indices_origin"])
    np.testing.assert_array_equal(inside_view(t["crop_points"], p["fov_min"], p["fov_max"]), t["crop_mask"] != 0)
    order = t["voxel_permutation"]
    np.testing.assert_array_equal(first_per_voxel(points, p["voxel_size"], order), t["voxel_indices_train"])
    np.testing.assert_array_equal(first_per_voxel(points, p["voxel_size"]), t["voxel_indices_eval"])


def test_golden_features_and_cells(golden):
    case = golden("scalr/features_cells")
    t, p = arrays(case), case.params
    features = feature_columns(t["points"], sensor_of(p))
    close(np.concatenate([t["points"][:, :3], features], 1), t["coords_and_features"], 1e-6)
    cells = cell_indices(t["points"], p["fov_min"], p["fov_max"], p["grids"], p["dim_proj"])
    np.testing.assert_array_equal(cells.T, t["cell_ind"])


def test_golden_augmentation(golden):
    case = golden("scalr/augment_distill")
    t = arrays(case)
    for i, row in enumerate(t["draws"]):
        close(augmented(t["points"], point_draws(row)), t[f"out_{i}"], 1e-5)
    t = arrays(golden("scalr/augment_downstream"))
    points = t["points_and_features"]
    for i, row in enumerate(t["draws"]):
        ours = augmented_apart(points[:, :3], points[:, 3:], point_draws(row))
        close(np.concatenate(ours, 1), t[f"out_{i}"], 1e-5)


def test_golden_resize(golden):
    case = golden("scalr/resize_pairing")
    image, p = case.tensors["image"], case.params
    size = (p["target_height"], p["target_width"])
    for antialias, name in ((True, "antialias"), (False, "no_antialias")):
        close(resized(image, size, antialias), case.tensors[f"image_resized_{name}"], 1e-6)


def test_golden_distill_sample(golden):
    """The whole preparation of a training sample with recorded random numbers."""
    case = golden("scalr/distill_sample")
    t, p = arrays(case), case.params
    motion = {name: pose(t[f"{name}_quat_wxyz"], t[f"{name}_trans"]) for name in
              ("lidar_to_ego", "ego_to_global_lidar", "ego_to_global_cam", "cam_to_ego")}  # fmt: skip
    cam_from_lidar = inverse_pose(motion["ego_to_global_cam"] @ motion["cam_to_ego"])
    cam_from_lidar = cam_from_lidar @ motion["ego_to_global_lidar"] @ motion["lidar_to_ego"]
    camera = Camera("recorded", t["image_uint8"], cam_from_lidar, t["intrinsics"])
    blind = Camera("blind", t["image_uint8"], cam_from_lidar, np.zeros((3, 3)))
    number = p["camera_index"]
    cameras = tuple(camera if i == number else blind for i in range(number + 1))
    points = t["points"].astype(np.float32)
    frame = LidarCameraFrame(points, None, cameras, "recorded", sensor_of(p))
    preparation = preparation_of(p, max_points=p["max_points"])
    reduced = points[first_per_voxel(points, p["voxel_size"], t["voxel_permutation"])]
    num_seen = len(pair_with_pixels(reduced, camera, t["image_uint8"].shape[:2], frame.sensor)[0])
    draws = SampleDraws(
        (number + 0.5) / len(cameras),
        (p["limit_center_index"] + 0.5) / num_seen,
        PointDraws(p["u_rotation"], 0.0, p["u_flip_apply"], max(p["flip_axis"], 0) / 2 + 0.25, p["u_scale"]),
        lambda count: t["voxel_permutation"],
    )
    sample = PairedSamples(tuple(p["im_size"])).sample(frame, 7, draws, preparation)
    assert torch.equal(sample.points.cells.T[None], case.tensors["out_cell_ind"])
    assert torch.equal(sample.points.neighbors.T[None], case.tensors["out_neighbors"])
    assert torch.equal(sample.pixels, case.tensors["out_pairing_images"])
    close(sample.points.features.T[None], t["out_feat"], 1e-5)
    close(sample.images, t["out_image"], 1e-5)
    assert sample.picture.tolist() == [7 * len(cameras) + number]


def test_golden_evaluation_batch(golden):
    case = golden("waffleiron/seg_eval_batch")
    t, p = case.tensors, case.params
    scans, sensor = [], sensor_of(p)
    while f"points_{len(scans)}" in t:
        i = len(scans)
        frame = LidarCameraFrame(t[f"points_{i}"].numpy(), t[f"labels_{i}"].numpy(), (), str(i), sensor)
        scans.append(evaluation_scan(frame, i, preparation_of(p)))
    batch = join_scans(scans)
    ours = pad_clouds(batch.points)
    close(ours.features, t["out_feat"], 1e-6)
    assert torch.equal(ours.cells, t["out_cell_ind"])
    assert torch.equal(ours.neighbors, t["out_neighbors_emb"])
    assert torch.equal(ours.real.float(), t["out_occupied_cells"])
    assert torch.equal(batch.labels, t["out_labels_orig"])
    start = 0
    for i, (part, count) in enumerate(
        zip(batch.read_back.split(batch.num_read.tolist()), batch.points.num_points, strict=True)
    ):
        assert torch.equal(part - start, t[f"out_upsample_{i}"])
        start += count


def brute_force(points, count):
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    return distance.argsort(axis=1, kind="stable")[:, :count]


def test_neighbors_are_those_of_brute_force():
    points = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    np.testing.assert_array_equal(nearest_neighbors(points, 16), brute_force(points.astype(np.float64), 17))


def test_few_points_repeat_the_farthest():
    points = np.array([[0.0, 0, 0], [1, 0, 0], [3, 0, 0]])
    assert nearest_neighbors(points, 4).tolist() == [[0, 1, 2, 2, 2], [1, 0, 2, 2, 2], [2, 1, 0, 0, 0]]
    assert nearest_neighbors(points[:1], 2).tolist() == [[0, 0, 0]]


def test_voxels_keep_one_real_point_each():
    points = np.random.default_rng(0).uniform(-3, 3, (500, 4)).astype(np.float32)
    order = np.random.default_rng(1).permutation(500)
    for rows in (first_per_voxel(points, 0.5), first_per_voxel(points, 0.5, order)):
        keys = np.floor((points[:, :3] - points[:, :3].min(0)) / np.float32(0.5)).astype(int)
        assert len(rows) == len(np.unique(keys, axis=0))
        assert len(np.unique(keys[rows], axis=0)) == len(rows)
    assert len(first_per_voxel(points, 0.0)) == 500
    assert len(first_per_voxel(points[:0], 0.5)) == 0


def small_frame(count=300, cameras=2, labels=True, seed=0):
    generator = np.random.default_rng(seed)
    points = np.concatenate([generator.uniform(-10, 10, (count, 3)), generator.random((count, 1))], 1).astype(
        np.float32
    )
    along_x = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    intrinsics = np.array([[20.0, 0, 20], [0, 20.0, 15], [0, 0, 1]])
    image = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    rig = tuple(Camera(f"cam{i}", image, along_x, intrinsics) for i in range(cameras))
    classes = generator.integers(0, 4, count) if labels else None
    return LidarCameraFrame(points.astype(np.float32), classes, rig, "small", Sensor(0.5, 0.3))


SMALL = {"grids": ((16, 16), (16, 8), (16, 8)), "fov_min": (-16, -16, -12), "fov_max": (16, 16, 12), "num_neighbors": 4}


def test_samples_replay():
    """The same (seed, epoch, index), the same sample; another epoch, another."""
    frame, preparation = small_frame(), Preparation(**SMALL)
    for samples in (PairedSamples((14, 28)), LabelledSamples()):
        first, again, other = (
            samples.sample(frame, 3, sample_draws(Draws(0, epoch), 3), preparation) for epoch in (1, 1, 2)
        )
        assert torch.equal(first.points.features, again.points.features)
        assert not np.array_equal(first.points.features.numpy(), other.points.features.numpy())


def test_batch_of_samples():
    frame, preparation = small_frame(), Preparation(**SMALL)
    samples = PairedSamples((14, 28))
    parts = [samples.sample(frame, i, sample_draws(Draws(0, 0), i), preparation) for i in range(3)]
    batch = samples.join(parts)
    assert torch.equal(batch.pixels[:, 0], batch.points.cloud)
    assert len(batch.pixels) == len(batch.points.features) == int(batch.points.num_points.sum())
    assert batch.images.shape == (3, 3, 14, 28)
    assert batch.pixels[:, 1].max() < 14
    assert batch.pixels[:, 2].max() < 28
    assert torch.equal(batch.points.neighbors[:, 0], torch.arange(len(batch.pixels)))
    # Features hold the augmented coordinates, whose distance is consistent.
    close(batch.points.features[:, 1:4].norm(dim=1), batch.points.features[:, 4], 1e-4)


def test_labels_stay_with_their_points():
    frame, preparation = small_frame(), Preparation(**SMALL)
    batch = LabelledSamples().sample(frame, 0, sample_draws(Draws(0, 0), 0), preparation)
    row_of = {tuple(point): i for i, point in enumerate(frame.points[:, :3])}
    rows = [row_of[tuple(xyz)] for xyz in batch.xyz.numpy()]
    np.testing.assert_array_equal(batch.labels, frame.labels[rows])
    intensity = batch.points.features[:, 0].numpy() * 0.3 + 0.5
    close(intensity, frame.points[rows, 3], 1e-5)


def test_blind_camera_is_passed_over():
    frame = small_frame(cameras=1)
    camera = frame.cameras[0]
    blind = camera._replace(cam_from_lidar=np.diag([1.0, -1, -1, 1]) @ camera.cam_from_lidar)
    only_up = frame.points[frame.points[:, 0] > 2]
    frame = frame._replace(points=only_up, labels=None, cameras=(blind, camera))
    samples, preparation = PairedSamples((14, 28)), Preparation(**SMALL)
    draws = sample_draws(Draws(0, 0), 0)
    for number in (0.0, 0.6):
        assert samples.sample(frame, 0, draws._replace(camera=number), preparation).picture.tolist() == [1]
    assert samples.sample(frame._replace(cameras=(blind,)), 0, draws, preparation) is None
    assert samples.sample(frame._replace(cameras=()), 0, draws, preparation) is None
    far = Preparation(**{**SMALL, "fov_min": (100, 100, 100), "fov_max": (110, 110, 110)})
    assert samples.sample(frame, 0, draws, far) is None
    assert LabelledSamples().sample(frame, 0, draws, far) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fov_min": (0, 0, 0), "fov_max": (1, 0, 1)}, "`fov_min` must be below `fov_max`"),
        ({"fov_min": (0, 0)}, "`fov_min` must be below `fov_max` on three axes"),
        ({"grids": ((4, 4),)}, "`grids` must be three pairs"),
        ({"num_neighbors": 0}, "`num_neighbors` must be at least 1, got 0"),
        ({"max_points": 0}, "`max_points` must be at least 1, got 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Preparation(**arguments)


def test_points_outside_are_refused():
    with pytest.raises(ValueError, match="`coordinates` must lie in the field of view"):
        cell_indices(np.array([[20.0, 0, 0]]), (-16, -16, -4), (16, 16, 4), ((4, 4),) * 3)
    far = Preparation(**{**SMALL, "fov_min": (100, 100, 100), "fov_max": (110, 110, 110)})
    with pytest.raises(ValueError, match=r"frame small has no point inside the field of view \(100, 100, 100\)"):
        evaluation_scan(small_frame(), 0, far)
    with pytest.raises(ValueError, match="`image_size` must be a positive height and width"):
        PairedSamples((0, 4))
