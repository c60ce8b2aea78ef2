"""What travels from an augmentation to a method. NamedTuples, because Lightning moves and collates those."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssl_distill.augment.pixel_map import PixelMap


class MultiCrop(NamedTuple):
    """Normalised crops of one batch; iterating yields one stack per resolution.

    Attributes:
        global_crops: Large crops, the teacher's views.
        local_crops: Small crops for the student only; L may be 0.
    """

    global_crops: Float[Tensor, "2 B C H W"]
    local_crops: Float[Tensor, "L B C h w"]


class MaskedCrops(NamedTuple):
    """Crops, and which patches of the global ones are hidden from the student.

    Attributes:
        global_crops: As in `MultiCrop`.
        local_crops: As in `MultiCrop`; never masked.
        masked: True where one of N patches of a global crop is hidden, row by row.
    """

    global_crops: Float[Tensor, "2 B C H W"]
    local_crops: Float[Tensor, "L B C h w"]
    masked: Bool[Tensor, "2 B N"]


class ObjectCrops(NamedTuple):
    """Masked crops that show one object of every image, and where it is.

    Attributes:
        global_crops: As in `MultiCrop`.
        local_crops: As in `MultiCrop`.
        masked: As in `MaskedCrops`.
        attend: True where a patch of a global crop belongs to the object; the object token may attend to it.
        valid: Whether a view, global ones first, shows an object to be learned from.
        redraws: How many crops were drawn and refused before each global crop.
        fallback: Global crops that are the best of those refused, because none was good.
    """

    global_crops: Float[Tensor, "2 B C H W"]
    local_crops: Float[Tensor, "L B C h w"]
    masked: Bool[Tensor, "2 B N"]
    attend: Bool[Tensor, "2 B N"]
    valid: Bool[Tensor, "V B"]
    redraws: Int[Tensor, "2 B"]
    fallback: Bool[Tensor, "2 B"]


class TwoViews(NamedTuple):
    """Two normalised views of every image, and where they lie in it.

    Attributes:
        images: First and second views.
        boxes_xyxy: Left, top, right, bottom edges of each view in pixels of the original image.
        flip: True where the view is mirrored left to right.
        origin: Seed and epoch of the draws and number of the image. Equal rows are equal views.
        moved: Where pixels of the crops went in the views, first views first; None where all stay at their places.
    """

    images: Float[Tensor, "2 B C H W"]
    boxes_xyxy: Float[Tensor, "2 B 4"]
    flip: Bool[Tensor, "2 B"]
    origin: Int[Tensor, "B 3"]
    moved: PixelMap | None = None


class MaskedImages(NamedTuple):
    """Normalised images, and how their patches are divided: every patch is either kept or hidden.

    Attributes:
        images: One view of every image.
        kept: Numbers, row by row, of the patches that the student sees.
        hidden: Numbers of the others, whose features it predicts.
    """

    images: Float[Tensor, "B C H W"]
    kept: Int[Tensor, "B Nk"]
    hidden: Int[Tensor, "B Nh"]


class TokenPositions(NamedTuple):
    """Points in grids of tokens: each a weighted sum of up to T tokens. A point that is not in the grid weighs nothing.

    Attributes:
        index: Numbers of the tokens, row by row.
        weight: Their shares; they sum to 1, or to 0 where there is no such point.
    """

    index: Int[Tensor, "*views B S T"]  # type: ignore[assignment]
    weight: Float[Tensor, "*views B S T"]


class AlignedCrops(NamedTuple):
    """Crops, and where the same points of an image lie in several of them.

    Attributes:
        global_crops: As in `MultiCrop`.
        local_crops: As in `MultiCrop`.
        own: Sampled patches of each global crop whose centres lie in the other one, at their place (2, B, S, 1).
        other: The same points in that other crop (2, B, S, 4): row 0 says where points of crop 0 are in crop 1.
        local: Sampled points of each local crop in global crop 1, then in global crop 0 (L, 2, B, s, 4).
    """

    global_crops: Float[Tensor, "2 B C H W"]
    local_crops: Float[Tensor, "L B C h w"]
    own: TokenPositions
    other: TokenPositions
    local: TokenPositions
