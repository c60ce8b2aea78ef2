"""From lidar points to pixels: one function for all data sets, in float64."""

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

from ssl_distill.lidar.frames import Camera, Sensor

_UNIT = 0.05  # how far a quaternion's norm may be off, as files with few digits have it


def rotation_matrix(quaternion_wxyz: Float[np.ndarray, "4"]) -> Float[np.ndarray, "3 3"]:
    """Rotation of a quaternion, which is normalised.

    Raises:
        ValueError: If its norm is not about 1, which scipy takes too: then it is no rotation, or not in this order.
    """
    norm = np.linalg.norm(quaternion_wxyz)
    if abs(norm - 1) > _UNIT:
        raise ValueError(f"`quaternion_wxyz` must have norm 1, got {norm:.4g}, of {np.asarray(quaternion_wxyz)}.")
    matrix: np.ndarray = Rotation.from_quat(quaternion_wxyz, scalar_first=True).as_matrix()
    return matrix


def pose(quaternion_wxyz: ArrayLike, translation: ArrayLike) -> Float[np.ndarray, "4 4"]:
    """Rigid motion that rotates, then moves by metres."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation_matrix(np.asarray(quaternion_wxyz, np.float64))
    matrix[:3, 3] = translation
    return matrix


def inverse_pose(matrix: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """The rigid motion back."""
    inverse = np.eye(4)
    inverse[:3, :3] = matrix[:3, :3].T
    inverse[:3, 3] = -matrix[:3, :3].T @ matrix[:3, 3]
    return inverse


def moved(points: Float[np.ndarray, "N _"], matrix: Float[np.ndarray, "_ 4"]) -> Float[np.ndarray, "N 3"]:
    """The first three columns, moved by a 3 x 4 or 4 x 4 matrix, in float64."""
    return points[:, :3].astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]


def split_projection(matrix: Float[np.ndarray, "3 4"]) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, "4 4"]]:
    """KITTI's K [I | t] as intrinsics K and rigid motion [I | t]."""
    intrinsics = matrix[:, :3]
    motion = np.eye(4)
    motion[:3, 3] = np.linalg.solve(intrinsics, matrix[:, 3])
    return intrinsics, motion


def project(
    points: Float[np.ndarray, "N _"], camera: Camera
) -> tuple[Float[np.ndarray, "N 2"], Float[np.ndarray, "N"]]:
    """Where a camera sees points.

    Deviation: the published code rounds to float32 in global coordinates, some 1000 m from the origin, which moves a
    pixel by up to 0.02; here the motions are composed in float64 and applied once.

    Returns:
        (u, v) in pixels, u to the right, with integers at the pixels' left and upper edges; and depth in metres along
        the camera's axis. Pixels of points behind the camera mean nothing.
    """
    seen = moved(points, camera.cam_from_lidar) @ camera.intrinsics.T
    depth = seen[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return seen[:, :2] / depth[:, None], depth


def visible(
    points: Float[np.ndarray, "N _"],
    uv: Float[np.ndarray, "N 2"],
    depth: Float[np.ndarray, "N"],
    image_size: tuple[int, int],
    sensor: Sensor,
) -> Bool[np.ndarray, "N"]:
    """Points inside the picture and in front of it, by the data set's rule; all bounds are strict. Occlusion is not
    tested.

    Args:
        points: In the lidar's frame.
        uv: As `project` gives it.
        depth: As `project` gives it.
        image_size: Height and width.
        sensor: The rule.
    """
    height, width = image_size
    upper = np.array([width - sensor.margin, height - sensor.margin])
    inside = np.all((uv > 0) & (uv < upper), axis=1)
    if sensor.min_depth is not None:
        inside &= depth > sensor.min_depth
    if sensor.min_lidar_x is not None:
        inside &= points[:, 0] > sensor.min_lidar_x
    return inside


def pair_with_pixels(
    points: Float[np.ndarray, "N _"], camera: Camera, image_size: tuple[int, int], sensor: Sensor
) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "M 2"]]:
    """Points that a camera sees, and the pixel of each.

    Returns:
        Rows of `points`, ascending; row and column of the pixel that holds each.
    """
    uv, depth = project(points, camera)
    kept = np.flatnonzero(visible(points, uv, depth, image_size, sensor))
    return kept, np.floor(uv[kept, ::-1]).astype(np.int64)


def resized_pixels(
    pixels: Int[np.ndarray, "M 2"], image_size: tuple[int, int], new_size: tuple[int, int]
) -> Int[np.ndarray, "M 2"]:
    """Pixels of a picture as pixels of its resized copy.

    Args:
        pixels: Rows and columns.
        image_size: Height and width before.
        new_size: Height and width after.
    """
    return np.floor(pixels * (np.array(new_size) / np.array(image_size))).astype(np.int64)
