"""The training view of linear probes."""

from jaxtyping import Int
from torch import Tensor

from ssl_distill.augment.base import ViewAugment
from ssl_distill.augment.color import normalize
from ssl_distill.augment.crops import RandomCrop, as_floats, check_channels
from ssl_distill.augment.geometry import DRAWS_PER_CROP
from ssl_distill.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD
from ssl_distill.augment.resample import Filter
from ssl_distill.data.batch import LabelledBatch, LabelledImages, source_sizes
from ssl_distill.draws import Draws


class ProbeCrop(ViewAugment[LabelledBatch]):
    """A random resized crop of every whole image, mirrored half of the time, normalised.

    Args:
        size: Height and width of the crop in pixels.
        scale: Smallest and largest area as a share of the image.
        filter: Of the antialiased resampling.
        mean: Of the channels in [0, 1]; subtracted last.
        std: Of the channels; divided by last.

    Source: DINO (arXiv 2104.14294), appendix F.2, and its official code.
    """

    def __init__(
        self,
        size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        filter: Filter = "bilinear",
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        check_channels(mean, std)
        self.crop = RandomCrop(size, scale, filter=filter)
        self.mean = mean
        self.std = std

    def cut(self, batch: LabelledBatch | LabelledImages, draws: Draws) -> LabelledBatch:
        """Crops with the labels of their images."""
        sizes = source_sizes(batch.image).to(batch.index.device)
        places = self.crop.place(sizes, draws.uniform(batch.index, view=0, count=DRAWS_PER_CROP)[None])
        (crops,) = self.crop.cut(batch.image, sizes, places)
        return LabelledBatch(crops, batch.label, batch.index)

    def finish(self, views: LabelledBatch, index: Int[Tensor, "B"], draws: Draws) -> LabelledBatch:
        """Nothing happens to colours."""
        return views._replace(image=normalize(as_floats(views.image), self.mean, self.std))
