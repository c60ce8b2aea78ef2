"""Frames as training and evaluation samples, and samples as batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ssl_distill.draws import Draws
from ssl_distill.lidar.augment_points import PointDraws, augmented, augmented_apart
from ssl_distill.lidar.batch import PointBatch, join_clouds
from ssl_distill.lidar.frames import IGNORED, LidarCameraFrame
from ssl_distill.lidar.preparation import (
    Preparation,
    feature_columns,
    first_per_voxel,
    nearest_kept,
    nearest_to,
)
from ssl_distill.lidar.projection import pair_with_pixels, resized_pixels

FEWEST_POINTS = 2  # batch norm needs more than one


class SampleDraws(NamedTuple):
    """Random numbers of one sample, each in [0, 1).

    Attributes:
        camera: Which camera.
        center: Which point is the middle of a cloud that is too large.
        points: How points are augmented.
        order: Number of points to the permutation that decides which point of a voxel is kept.
    """

    camera: float
    center: float
    points: PointDraws
    order: Callable[[int], Int[np.ndarray, "N"]]


def sample_draws(draws: Draws, index: int) -> SampleDraws:
    """A sample's random numbers, a function of (seed, epoch, index)."""
    rows = torch.tensor([index])
    camera, center, *points = draws.uniform(rows, 0, 7)[0].tolist()

    def order(count: int) -> Int[np.ndarray, "N"]:
        return draws.uniform(rows, 1, count)[0].numpy().argsort(kind="stable")

    return SampleDraws(camera, center, PointDraws(*points), order)


class PointsAndImages(NamedTuple):
    """Clouds of what one camera sees, and its picture: what ScaLR eats.

    Attributes:
        points: B clouds.
        images: One picture per cloud, in [0, 1].
        pixels: Number of the picture, row and column for every point.
        picture: A number for every picture, the same whenever it is drawn.
    """

    points: PointBatch
    images: Float[Tensor, "B 3 H W"]
    pixels: Int[Tensor, "P 3"]
    picture: Int[Tensor, "B"]


class ScanBatch(NamedTuple):
    """Clouds with classes: whole scans for evaluation, or augmented ones to train on.

    Attributes:
        points: B clouds.
        labels: Classes of R points, 255 where unknown; the scans' own points in evaluation.
        read_back: Row in `points` from which each of the R points takes its prediction.
        xyz: Where the R points are in metres, before any augmentation.
        num_read: How many of the R points belong to each cloud.
        index: Position of each scan in its data set.
    """

    points: PointBatch
    labels: Int[Tensor, "R"]
    read_back: Int[Tensor, "R"]
    xyz: Float[Tensor, "R 3"]
    num_read: Int[Tensor, "B"]
    index: Int[Tensor, "B"]  # type: ignore[assignment]  # tuples have a method of this name


class Samples(ABC):
    """How a frame becomes a training sample.

    Attributes:
        needs_bank: Whether what is trained is judged by a probe, which needs labelled scans to learn from.
    """

    needs_bank: bool

    @abstractmethod
    def sample(self, frame: LidarCameraFrame, position: int, draws: SampleDraws, preparation: Preparation) -> Any:
        """A batch of one; None if the frame has nothing to train on."""

    @abstractmethod
    def join(self, samples: Sequence[Any]) -> Any:
        """A batch."""


class PairedSamples(Samples):
    """Points that one camera sees, and its picture. No labels.

    The camera is drawn; one that sees nothing is passed over for the next. Points are reduced, paired with pixels and
    augmented; the picture is only resized, so that what a teacher says of it can be kept.

    Args:
        image_size: Height and width that pictures are resized to, whatever their aspect ratio.
        antialias: Whether to filter when pictures shrink; the published code did not.

    Source: ScaLR (arXiv 2310.17504), by its published code.
    """

    needs_bank = True

    def __init__(self, image_size: tuple[int, int] = (224, 448), antialias: bool = True) -> None:
        if min(image_size) < 1:
            raise ValueError(f"`image_size` must be a positive height and width, got {image_size}.")
        self.image_size = (image_size[0], image_size[1])
        self.antialias = antialias

    def sample(
        self, frame: LidarCameraFrame, position: int, draws: SampleDraws, preparation: Preparation
    ) -> PointsAndImages | None:
        """Points of the first camera, from the drawn one on, that sees any; None if there is no such camera."""
        # Order matters: reduce, pair, limit, augment, crop, as in the published code.
        points = frame.points
        points = points[first_per_voxel(points, preparation.voxel_size_m, draws.order(len(points)))]
        drawn = int(draws.camera * len(frame.cameras))
        for number in (*range(drawn, len(frame.cameras)), *range(drawn)):
            camera = frame.cameras[number]
            image = camera.pixels()
            size = (image.shape[0], image.shape[1])
            seen, pixels = pair_with_pixels(points, camera, size, frame.sensor)
            if not len(seen):
                continue
            near = nearest_to(points[seen], points[seen][int(draws.center * len(seen)), :3], preparation.max_points)
            cloud = augmented(points[seen][near], draws.points)
            inside = preparation.inside(cloud)
            if inside.sum() < FEWEST_POINTS:
                continue
            cloud = cloud[inside]
            pixels = resized_pixels(pixels[near][inside], size, self.image_size)
            picture = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
            return PointsAndImages(
                preparation.cloud(cloud[:, :3], feature_columns(cloud, frame.sensor)),
                resized(picture, self.image_size, self.antialias),
                torch.from_numpy(np.pad(pixels, ((0, 0), (1, 0)))),
                torch.tensor([position * len(frame.cameras) + number]),
            )
        return None

    def join(self, samples: Sequence[PointsAndImages]) -> PointsAndImages:
        """A batch; pictures are renumbered."""
        pixels = [torch.cat([torch.full_like(s.pixels[:, :1], i), s.pixels[:, 1:]], 1) for i, s in enumerate(samples)]
        return PointsAndImages(
            join_clouds([sample.points for sample in samples]),
            torch.cat([sample.images for sample in samples]),
            torch.cat(pixels),
            torch.cat([sample.picture for sample in samples]),
        )


class LabelledSamples(Samples):
    """Whole scans with their classes, to train a probe or a network on.

    Coordinates and features are augmented apart.

    Source: WaffleIron (arXiv 2301.10100), by its published code.
    """

    needs_bank = False

    def sample(
        self, frame: LidarCameraFrame, position: int, draws: SampleDraws, preparation: Preparation
    ) -> ScanBatch | None:
        """The augmented scan; None if nothing of it is in the field of view."""
        kept = first_per_voxel(frame.points, preparation.voxel_size_m, draws.order(len(frame.points)))
        if not len(kept):
            return None
        center = frame.points[kept[int(draws.center * len(kept))], :3]
        kept = kept[nearest_to(frame.points[kept], center, preparation.max_points)]
        points = frame.points[kept]
        coordinates, features = augmented_apart(points[:, :3], feature_columns(points, frame.sensor), draws.points)
        inside = preparation.inside(coordinates)
        if inside.sum() < FEWEST_POINTS:
            return None
        kept = kept[inside]
        return ScanBatch(
            preparation.cloud(coordinates[inside], features[inside]),
            torch.from_numpy(known_labels(frame)[kept]),
            torch.arange(len(kept)),
            torch.from_numpy(frame.points[kept, :3]),
            torch.tensor([len(kept)]),
            torch.tensor([position]),
        )

    def join(self, samples: Sequence[ScanBatch]) -> ScanBatch:
        """A batch."""
        return join_scans(samples)


def evaluation_scan(frame: LidarCameraFrame, position: int, preparation: Preparation) -> ScanBatch:
    """The whole scan as it is; every point of it takes its prediction from the nearest one that was kept.

    Raises:
        ValueError: If no point is inside the field of view.
    """
    kept = first_per_voxel(frame.points, preparation.voxel_size_m)
    features = feature_columns(frame.points[kept], frame.sensor)
    kept_points = frame.points[kept]
    inside = preparation.inside(kept_points)
    if not inside.any():
        raise ValueError(
            f"frame {frame.frame_id} has no point inside the field of view {preparation.fov_min} to"
            f" {preparation.fov_max}, in metres around the lidar."
        )
    kept_points = kept_points[inside]
    return ScanBatch(
        preparation.cloud(kept_points[:, :3], features[inside]),
        torch.from_numpy(known_labels(frame)),
        torch.from_numpy(nearest_kept(kept_points, frame.points)),
        torch.from_numpy(frame.points[:, :3]),
        torch.tensor([len(frame.points)]),
        torch.tensor([position]),
    )


def join_scans(scans: Sequence[ScanBatch]) -> ScanBatch:
    """Several batches as one."""
    starts = [0]
    for scan in scans:
        starts.append(starts[-1] + len(scan.points.features))
    return ScanBatch(
        join_clouds([scan.points for scan in scans]),
        torch.cat([scan.labels for scan in scans]),
        torch.cat([scan.read_back + start for scan, start in zip(scans, starts, strict=False)]),
        torch.cat([scan.xyz for scan in scans]),
        torch.cat([scan.num_read for scan in scans]),
        torch.cat([scan.index for scan in scans]),
    )


def known_labels(frame: LidarCameraFrame) -> Int[np.ndarray, "N"]:
    """Labels of a frame, or 255 everywhere."""
    return np.full(len(frame.points), IGNORED) if frame.labels is None else np.asarray(frame.labels, np.int64)


def resized(image: Float[Tensor, "1 3 H W"], image_size: tuple[int, int], antialias: bool) -> Float[Tensor, "1 3 h w"]:
    """A picture at another size, whatever its aspect ratio."""
    return F.interpolate(image, image_size, mode="bilinear", antialias=antialias)
