"""Reading of point and label files, with errors that name the file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import DTypeLike

from ssl_distill.data.files import check_regular
from ssl_distill.lidar.frames import IGNORED

_FARTHEST = 1e4
KITTI_COLUMNS, NUSCENES_COLUMNS = 4, 5  # x, y, z, intensity, and nuScenes' ring


def read_points(path: str | Path, num_columns: int) -> Float[np.ndarray, "N 4"]:
    """Little-endian float32 records; only x, y, z and intensity are kept.

    Raises:
        ValueError: As in `check_points`, or if the file's size is no multiple of a record.
        OSError: If it cannot be read, or is none.
    """
    size = check_regular(path)
    record = 4 * num_columns
    if size % record:
        raise ValueError(
            f"{path} has {size} bytes, no multiple of {record} ({num_columns} numbers per point); is it cut off, or of"
            " another data set?"
        )
    points: Float[np.ndarray, "N 4"] = np.fromfile(path, "<f4").reshape(-1, num_columns)[:, :4]
    check_points(points, path)
    return np.ascontiguousarray(points)


def check_points(points: Float[np.ndarray, "N 4"], where: str | Path) -> None:
    """Refuse points that no lidar has seen: voxels and neighbours of such a scan mean nothing.

    Raises:
        ValueError: If a number is not finite, or above 10,000 (metres, or intensity).
    """
    wrong = np.flatnonzero(~(np.abs(points) <= _FARTHEST).all(1))  # not a number is not below it either
    if len(wrong):
        raise ValueError(
            f"{where} has {len(wrong)} of {len(points)} points that are not finite or beyond {_FARTHEST:,.0f}, such as"
            f" {points[wrong[0]].tolist()}; is it damaged, or of another data set?"
        )


def read_labels(
    path: str | Path, dtype: DTypeLike, table: Int[np.ndarray, "V"], num_points: int
) -> Int[np.ndarray, "N"]:
    """One number per point, the low 16 bits of it looked up in a table.

    Raises:
        ValueError: If there are not as many as points.
        OSError: If the file cannot be read.
    """
    itemsize = np.dtype(dtype).itemsize
    size = check_regular(path)
    if size != num_points * itemsize:
        raise ValueError(f"{path} has labels for {size / itemsize:g} points, its scan has {num_points}.")
    raw = np.fromfile(path, dtype)
    return table[raw.astype(np.int64) & 0xFFFF]


def label_table(classes: Sequence[Sequence[int]]) -> Int[np.ndarray, "V"]:
    """From raw numbers, 0 to 65535, to the position of the class that has them; 255 for all others."""
    table = np.full(2**16, IGNORED, np.int64)
    for position, raw in enumerate(classes):
        table[list(raw)] = position
    return table
