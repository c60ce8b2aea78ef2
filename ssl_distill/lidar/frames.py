"""What every lidar data set yields: one scan with its cameras, all of the data set's own rules folded in."""

from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8

from ssl_distill.data.images import decode, read_image

IGNORED = 255  # label of points that count neither in training nor in evaluation


class Sensor(NamedTuple):
    """How a data set's lidar is read, and which of its points a camera is said to see.

    Attributes:
        intensity_mean: Of all points; features hold (intensity - mean) / std.
        intensity_std: Of all points.
        min_depth: Smallest distance in metres from the camera, along its axis; None for no such rule.
        min_lidar_x: Smallest x in metres in the lidar's frame; None for no such rule.
        margin: Pixels at the right and lower border that are left out; at the left and upper it is the border itself.
    """

    intensity_mean: float
    intensity_std: float
    min_depth: float | None = 1.0
    min_lidar_x: float | None = None
    margin: float = 1.0


class EncodedImage(NamedTuple):
    """A picture that is not decoded yet.

    Attributes:
        content: All bytes of an image file.
        name: What to call it in an error.
    """

    content: bytes
    name: str


class Camera(NamedTuple):
    """One picture and where it was taken.

    Attributes:
        name: Unique in its frame.
        image: RGB bytes, the file that holds them, or what such a file holds.
        cam_from_lidar: Rigid motion from lidar to camera coordinates (x right, y down, z forward), in metres.
        intrinsics: Focal lengths and principal point in pixels of the image.
    """

    name: str
    image: UInt8[np.ndarray, "H W 3"] | Path | EncodedImage
    cam_from_lidar: Float[np.ndarray, "4 4"]
    intrinsics: Float[np.ndarray, "3 3"]

    def pixels(self) -> UInt8[np.ndarray, "H W 3"]:
        """The picture, read and decoded if need be.

        Raises:
            ValueError: If the intrinsics are those of a picture of another size.
            OSError: If it cannot be read.
        """
        image = self.image if isinstance(self.image, np.ndarray) else _decoded(self.image)
        height, width = image.shape[:2]
        center_x, center_y = self.intrinsics[0, 2], self.intrinsics[1, 2]
        if not (width / 4 < center_x < 3 * width / 4 and height / 4 < center_y < 3 * height / 4):
            raise ValueError(
                f"`intrinsics` of {self.name} must be those of its image, {width} x {height}, but their principal point"
                f" is ({center_x:g}, {center_y:g}); was the image resized?"
            )
        return image


class LidarCameraFrame(NamedTuple):
    """One scan.

    Attributes:
        points: x, y, z in metres in the lidar's frame (right-handed, z up) and intensity.
        labels: Classes from 0 on, or 255 where a point has none; None for an unlabelled scan.
        cameras: Pictures taken at about the same time.
        frame_id: Unique in its data set.
        sensor: The data set's rules.
    """

    points: Float[np.ndarray, "N 4"]
    labels: Int[np.ndarray, "N"] | None
    cameras: tuple[Camera, ...]
    frame_id: str
    sensor: Sensor


@runtime_checkable
class Frames(Protocol):
    """Scans by position; each is read when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> LidarCameraFrame: ...


def _decoded(image: Path | EncodedImage) -> UInt8[np.ndarray, "H W 3"]:
    pixels = read_image(image) if isinstance(image, Path) else decode(image.content, image.name)
    return pixels.permute(1, 2, 0).numpy()
