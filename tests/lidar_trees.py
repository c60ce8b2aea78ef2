"""Writers of tiny data sets on disk, in the layouts of the real ones."""

import json

import numpy as np
from PIL import Image

from ssl_distill.lidar import nuscenes, semantic_kitti
from ssl_distill.lidar.projection import inverse_pose

VERSION = "v1.0-mini"


def random_pose(generator, reach=3.0):
    """Quaternion (w, x, y, z), translation, and the matrix they stand for."""
    quaternion = generator.normal(size=4)
    quaternion /= np.linalg.norm(quaternion)
    w, x, y, z = quaternion
    v = np.array([x, y, z])
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    matrix = np.eye(4)
    matrix[:3, :3] = (w * w - v @ v) * np.eye(3) + 2 * np.outer(v, v) + 2 * w * cross
    matrix[:3, 3] = generator.normal(size=3) * reach
    return quaternion.tolist(), matrix[:3, 3].tolist(), matrix


def quaternion_of(rotation):
    """Inverse of the above for any rotation: the eigenvector of Bar-Itzhack's matrix."""
    r = rotation
    k = np.array(
        [
            [r[0, 0] - r[1, 1] - r[2, 2], r[1, 0] + r[0, 1], r[2, 0] + r[0, 2], r[2, 1] - r[1, 2]],
            [r[1, 0] + r[0, 1], r[1, 1] - r[0, 0] - r[2, 2], r[2, 1] + r[1, 2], r[0, 2] - r[2, 0]],
            [r[2, 0] + r[0, 2], r[2, 1] + r[1, 2], r[2, 2] - r[0, 0] - r[1, 1], r[1, 0] - r[0, 1]],
            [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], r[0, 0] + r[1, 1] + r[2, 2]],
        ]
    )
    x, y, z, w = np.linalg.eigh(k)[1][:, -1]
    return [w, x, y, z]


def save_points(path, points, num_columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = np.zeros((len(points), num_columns - 4), "<f4")
    np.concatenate([points, extra], 1).astype("<f4").tofile(path)


def save_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_nuscenes(root, frames, seed=0, lidarseg=True, scenes=("scene-0061",)):
    """Frames as key frames, spread over the scenes; ego poses are random, at lidar and camera time different ones.

    The scenes' class numbers are written as the categories of the first classes that have one, shuffled.
    """
    generator = np.random.default_rng(seed)
    channels = [camera.name for camera in frames[0].cameras]
    categories = [name for names in nuscenes.CLASSES.values() for name in names] + ["noise", "vehicle.ego"]
    numbers = generator.permutation(len(categories)) + 1
    number = {name: int(index) for name, index in zip(categories, numbers, strict=True)}
    of_class = [number[names[0]] for names in nuscenes.CLASSES.values()]

    tables = {name: [] for name in ("scene", "sample", "sample_data", "calibrated_sensor", "ego_pose", "sensor")}
    tables["sensor"].append({"token": "s-lidar", "channel": "LIDAR_TOP", "modality": "lidar"})
    for channel in channels:
        tables["sensor"].append({"token": f"s-{channel}", "channel": channel, "modality": "camera"})
    tables["lidarseg"] = []
    for name in scenes:
        tables["scene"].append({"token": f"t-{name}", "name": name})
    for i, frame in enumerate(frames):
        sample = f"sample-{i}"
        scene = scenes[i % len(scenes)]
        tables["sample"].append({"token": sample, "scene_token": f"t-{scene}", "timestamp": i})
        rotation, translation, ego_from_lidar = random_pose(generator)
        global_from_ego = random_pose(generator, 1000.0)

        def add(name, kind, file, mounted, ego, intrinsics, i=i, sample=sample):
            token = f"{name}-{i}"
            tables["calibrated_sensor"].append(
                {
                    "token": f"c-{token}",
                    "sensor_token": kind,
                    "rotation": mounted[0],
                    "translation": mounted[1],
                    "camera_intrinsic": intrinsics,
                }
            )
            tables["ego_pose"].append({"token": f"e-{token}", "rotation": ego[0], "translation": ego[1]})
            row = {"token": token, "sample_token": sample, "ego_pose_token": f"e-{token}", "filename": file}
            row |= {"calibrated_sensor_token": f"c-{token}", "is_key_frame": True}
            sweep = {**row, "token": f"sweep-{token}", "is_key_frame": False, "filename": "nowhere"}
            tables["sample_data"] += [sweep, row]
            return token

        file = f"samples/LIDAR_TOP/{i}.pcd.bin"
        save_points(root / file, frame.points, 5)
        lidar_mount = (rotation, translation)
        token = add("lidar", "s-lidar", file, lidar_mount, global_from_ego, [])
        if lidarseg:
            labels = np.array([of_class[label] if label != 255 else number["noise"] for label in frame.labels])
            path = root / "lidarseg" / VERSION / f"{token}_lidarseg.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            labels.astype(np.uint8).tofile(path)
            tables["lidarseg"].append({"sample_data_token": token, "filename": str(path.relative_to(root))})
        for camera in frame.cameras:
            file = f"samples/{camera.name}/{i}.png"
            save_image(root / file, camera.image)
            ego = random_pose(generator, 1000.0)
            # cam_from_lidar = inv(global_from_ego' @ ego_from_cam) @ global_from_ego @ ego_from_lidar
            ego_from_cam = inverse_pose(ego[2]) @ global_from_ego[2] @ ego_from_lidar
            ego_from_cam = ego_from_cam @ inverse_pose(camera.cam_from_lidar)
            mounted = (quaternion_of(ego_from_cam[:3, :3]), ego_from_cam[:3, 3].tolist())
            add(camera.name, f"s-{camera.name}", file, mounted, ego, camera.intrinsics.tolist())
    tables["category"] = [{"name": name, "index": number[name]} for name in categories]
    if not lidarseg:
        del tables["lidarseg"]
        tables["category"] = [{"name": name} for name in categories]
    folder = root / VERSION
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))


def raw_kitti_labels(labels, generator):
    """SemanticKITTI's numbers, one of several for each class, with an instance in the high bits."""
    raw = [names[-1] for names in semantic_kitti.CLASSES.values()]
    semantic = np.array([raw[label] if label != 255 else 1 for label in labels])
    return (semantic | (generator.integers(0, 100, len(labels)) << 16)).astype("<u4")


def lines_of(calibration):
    return "".join(
        f"{name}: {' '.join(f'{value:.12e}' for value in np.ravel(matrix))}\n" for name, matrix in calibration
    )


def kitti_calibration(camera, generator):
    """P2 with a shift, and the motion to camera 0 that makes the camera's pose of both."""
    shift = np.eye(4)
    shift[:3, 3] = generator.normal(size=3) * 0.1
    p2 = camera.intrinsics @ shift[:3]
    return p2, inverse_pose(shift) @ camera.cam_from_lidar


def write_semantic_kitti(root, frames, sequence="00", labels=True, seed=0):
    generator = np.random.default_rng(seed)
    folder = root / "dataset" / "sequences" / sequence
    camera = frames[0].cameras[0]
    p2, trans = kitti_calibration(camera, generator)
    for i, frame in enumerate(frames):
        save_points(folder / "velodyne" / f"{i:06}.bin", frame.points, 4)
        save_image(folder / "image_2" / f"{i:06}.png", frame.cameras[0].image)
        if labels:
            (folder / "labels").mkdir(exist_ok=True)
            raw_kitti_labels(frame.labels, generator).tofile(folder / "labels" / f"{i:06}.label")
    (folder / "calib.txt").write_text(lines_of([("P0", p2), ("P2", p2), ("Tr", trans[:3])]) + "\n")
    return folder


def write_kitti_object(root, frames, seed=0):
    generator = np.random.default_rng(seed)
    folder = root / "training"
    for i, frame in enumerate(frames):
        camera = frame.cameras[0]
        p2, trans = kitti_calibration(camera, generator)
        rectify = random_pose(generator)[2][:3, :3]
        velo = trans.copy()
        velo[:3] = rectify.T @ trans[:3]
        save_points(folder / "velodyne" / f"{i:06}.bin", frame.points, 4)
        save_image(folder / "image_2" / f"{i:06}.png", camera.image)
        (folder / "calib").mkdir(exist_ok=True)
        lines = lines_of([("P2", p2), ("R0_rect", rectify), ("Tr_velo_to_cam", velo[:3])])
        (folder / "calib" / f"{i:06}.txt").write_text(lines)
    return folder
