"""Augmentations of point clouds, as functions of uniform random numbers."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

FLIP_PROBABILITY = 2 / 3
SCALE_RANGE = 0.1


class PointDraws(NamedTuple):
    """Numbers in [0, 1) that decide an augmentation.

    Attributes:
        rotation: Angle about the vertical axis.
        feature_rotation: Angle of the features' x and y, where they are turned of their own.
        flip: Whether to mirror.
        axis: Which of x and y.
        scale: Factor.
    """

    rotation: float
    feature_rotation: float
    flip: float
    axis: float
    scale: float


def augmented(points: Float[np.ndarray, "N 4"], draws: PointDraws) -> Float[np.ndarray, "N 4"]:
    """Points turned, mirrored and scaled; intensity stays.

    Source: ScaLR (arXiv 2310.17504), by its published code.
    """
    points = points.copy()
    points[:, :2] = _turned(points[:, :2], draws.rotation)
    _mirror(points, draws)
    points[:, :3] *= _factor(draws)
    return points


def augmented_apart(
    coordinates: Float[np.ndarray, "N 3"], features: Float[np.ndarray, "N 5"], draws: PointDraws
) -> tuple[Float[np.ndarray, "N 3"], Float[np.ndarray, "N 5"]]:
    """Coordinates turned and mirrored, features turned by another angle and scaled: decorrelated on purpose.

    Args:
        coordinates: Decide cells and neighbours.
        features: Intensity, x, y, z, distance.
        draws: The random numbers.

    Source: WaffleIron's published code, for training with labels.
    """
    coordinates, features = coordinates.copy(), features.copy()
    coordinates[:, :2] = _turned(coordinates[:, :2], draws.rotation)
    features[:, 1:3] = _turned(features[:, 1:3], draws.feature_rotation)
    _mirror(coordinates, draws)
    features[:, 1:] *= _factor(draws)
    return coordinates, features


def _turned(xy: np.ndarray, uniform: float) -> np.ndarray:
    angle = (2 * uniform - 1) * np.pi
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], xy.dtype)
    return xy @ rotation


def _mirror(points: np.ndarray, draws: PointDraws) -> None:
    if draws.flip < FLIP_PROBABILITY:
        points[:, int(2 * draws.axis)] *= -1


def _factor(draws: PointDraws) -> float:
    return float(1 + (2 * draws.scale - 1) * SCALE_RANGE)
