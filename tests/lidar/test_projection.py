import numpy as np
import pytest
import torch

from ssl_distill.lidar.frames import Camera, Sensor
from ssl_distill.lidar.projection import (
    inverse_pose,
    moved,
    pair_with_pixels,
    pose,
    project,
    resized_pixels,
    rotation_matrix,
    split_projection,
)


def arrays(case):
    return {name: value.numpy() for name, value in case.tensors.items()}


def camera_of(cam_from_lidar, intrinsics):
    return Camera("front", np.zeros((1, 1, 3), np.uint8), cam_from_lidar, intrinsics)


def nuscenes_chain(t):
    motion = {name: pose(t[f"{name}_quat_wxyz"], t[f"{name}_trans"]) for name in
              ("lidar_to_ego", "ego_to_global_lidar", "ego_to_global_cam", "cam_to_ego")}  # fmt: skip
    to_camera = inverse_pose(motion["ego_to_global_cam"] @ motion["cam_to_ego"])
    return to_camera @ motion["ego_to_global_lidar"] @ motion["lidar_to_ego"]


def check_pairs(t, points, camera, size, sensor):
    kept, pixels = pair_with_pixels(points, camera, size, sensor)
    assert len(kept) > 0
    np.testing.assert_array_equal(kept, t["kept_indices"])
    np.testing.assert_array_equal(pixels, t["pairing_images"][:, 1:])


def test_golden_nuscenes(golden):
    case = golden("scalr/nuscenes_projection")
    t, p = arrays(case), case.params
    camera = camera_of(nuscenes_chain(t), t["intrinsics"])
    np.testing.assert_allclose(camera.cam_from_lidar, t["cam_from_lidar"], rtol=1e-6, atol=1e-6)
    uv, depth = project(t["points"], camera)
    np.testing.assert_allclose(uv, t["uv_f64"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(depth, t["depth_f64"], rtol=1e-6, atol=1e-6)
    check_pairs(t, t["points"], camera, (p["image_height"], p["image_width"]), Sensor(0, 1, p["min_depth"]))


def test_golden_kitti(golden):
    case = golden("scalr/kitti_projection")
    t, p = arrays(case), case.params
    trans = np.vstack([t["Tr"], [0, 0, 0, 1]])
    np.testing.assert_allclose(t["P2"] @ trans, t["projection_matrix"], rtol=1e-12, atol=1e-12)
    intrinsics, motion = split_projection(t["P2"])
    camera = camera_of(motion @ trans, intrinsics)
    np.testing.assert_allclose(intrinsics @ camera.cam_from_lidar[:3], t["projection_matrix"], rtol=1e-9, atol=1e-9)
    sensor = Sensor(0, 1, min_depth=None, min_lidar_x=p["min_x"])
    check_pairs(t, t["points"], camera, (p["image_height"], p["image_width"]), sensor)
    uv, _ = project(t["points"], camera)
    whole = moved(t["points"], t["P2"] @ trans)
    np.testing.assert_allclose(uv, whole[:, :2] / whole[:, 2:], rtol=1e-9)


def test_golden_pandaset(golden):
    """Points in world coordinates stay in float64 until they are near the sensor."""
    case = golden("scalr/pandaset_projection")
    t, p = arrays(case), case.params
    intrinsics = np.array([[p["fx"], 0, p["cx"]], [0, p["fy"], p["cy"]], [0, 0, 1]])
    camera_from_world = inverse_pose(pose(t["cam_heading_wxyz"], t["cam_position"]))
    sensor = Sensor(0, 1, min_depth=0.0, margin=0.0)
    size = (p["image_height"], p["image_width"])
    check_pairs(t, t["points_world"], camera_of(camera_from_world, intrinsics), size, sensor)
    ego_from_world = inverse_pose(pose(t["lidar_heading_wxyz"], t["lidar_position"]))
    ego_from_world[2, 3] += p["z_shift"]
    ego = moved(t["points_world"], ego_from_world)
    np.testing.assert_allclose(ego[t["kept_indices"]], t["points_ego_kept"], rtol=1e-9, atol=1e-9)
    # From the sensor's frame, as our loaders give it, the same pixels.
    camera = camera_of(camera_from_world @ inverse_pose(ego_from_world), intrinsics)
    check_pairs(t, ego, camera, size, sensor)


def test_golden_resized_pixels(golden):
    case = golden("scalr/resize_pairing")
    t, p = arrays(case), case.params
    new_size = (p["target_height"], p["target_width"])
    pixels = resized_pixels(t["pairing_images"][:, 1:], t["image"].shape[2:], new_size)
    np.testing.assert_array_equal(pixels, t["pairing_images_resized"][:, 1:])


def test_rotations_are_rotations():
    generator = np.random.default_rng(0)
    for _ in range(10):
        quaternion = generator.normal(size=4)
        quaternion /= np.linalg.norm(quaternion)
        rotation = rotation_matrix(quaternion)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) == pytest.approx(1)
        motion = pose(quaternion, generator.normal(size=3))
        np.testing.assert_allclose(inverse_pose(motion) @ motion, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(rotation_matrix(np.array([0.5**0.5, 0, 0, 0.5**0.5])) @ [1, 0, 0], [0, 1, 0], atol=1e-12)


def test_bounds_are_strict():
    """A pixel's edge belongs to nobody at the border, and one more pixel is left out at the right and below."""
    camera = camera_of(np.eye(4), np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1]]))
    u = torch.tensor([0.0, 0.5, 8.5, 9.0, 9.5, 10.0])
    points = torch.stack([u, torch.full_like(u, 2.5), torch.full_like(u, 1.0)], 1).numpy() * 2  # at depth 2
    assert pair_with_pixels(points, camera, (5, 10), Sensor(0, 1))[0].tolist() == [1, 2]
    assert pair_with_pixels(points, camera, (5, 10), Sensor(0, 1, margin=0))[0].tolist() == [1, 2, 3, 4]
    near = points / 2  # at depth 1
    assert len(pair_with_pixels(near, camera, (5, 10), Sensor(0, 1))[0]) == 0
    assert len(pair_with_pixels(-points, camera, (5, 10), Sensor(0, 1))[0]) == 0
    assert pair_with_pixels(points, camera, (5, 10), Sensor(0, 1, min_lidar_x=2.0))[0].tolist() == [2]


def test_rounded_quaternions_are_normalised():
    rounded = np.array([0.7, 0, 0, 0.71])
    rotation = rotation_matrix(rounded)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)


def test_errors():
    with pytest.raises(ValueError, match=r"`quaternion_wxyz` must have norm 1, got 1.414, of \[1. 0. 1. 0.\]"):
        rotation_matrix(np.array([1.0, 0, 1, 0]))
    of_a_larger_image = np.array([[1266.0, 0, 816], [0, 1266, 491], [0, 0, 1]])
    camera = Camera("CAM_BACK", np.zeros((450, 800, 3), np.uint8), np.eye(4), of_a_larger_image)
    message = r"`intrinsics` of CAM_BACK .* 800 x 450, .* \(816, 491\); was the image resized\?"
    with pytest.raises(ValueError, match=message):
        camera.pixels()
