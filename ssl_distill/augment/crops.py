"""The crop maker of all augmentations: random places, pixels from images of any size, and colours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ssl_distill.augment.checks import check_probability, check_range
from ssl_distill.augment.color import DRAWS_PER_COLOR, Recipe, normalize, recolor
from ssl_distill.augment.geometry import DRAWS_PER_CROP, CropBoxes, sample_crops, scale_boxes
from ssl_distill.augment.kornia_recipe import KorniaRecipe
from ssl_distill.augment.pixel_map import PixelMap, joined, unmoved
from ssl_distill.augment.resample import Filter, resample_crops
from ssl_distill.data.batch import Images
from ssl_distill.data.shared_batch import empty_images
from ssl_distill.draws import Draws

_PIXELS_AT_ONCE = 2**18  # some dozen passes are made over them: on a CPU they stay in the cache


@dataclass(frozen=True)
class RandomCrop:
    """A random resized crop, mirrored or not: how crops of one kind are drawn and resized.

    Args:
        size: Height and width of the result in pixels.
        scale: Smallest and largest area as a share of the image.
        ratio: Smallest and largest width over height in the original image.
        flip_probability: Share of crops that are mirrored left to right.
        filter: Of the antialiased resampling.
        names: What errors call `size` and `scale`.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    filter: Filter = "bicubic"
    names: tuple[str, str] = ("size", "scale")

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"`{self.names[0]}` must be at least 1 pixel, got {self.size}.")
        check_range(self.names[1], self.scale, most=1)
        check_range("ratio", self.ratio)
        check_probability("flip_probability", self.flip_probability)

    def place(self, source_size: Float[Tensor, "B 2"], uniform: Float[Tensor, "V B draws"]) -> CropBoxes:
        """Where V crops of every image lie, in its own pixels.

        Args:
            source_size: Height and width of each image.
            uniform: `DRAWS_PER_CROP` numbers in [0, 1) for each crop.
        """
        sizes = source_size.float().repeat(len(uniform), 1)  # a trainer in float64 converts batches
        places = sample_crops(sizes, uniform.flatten(0, 1), self.scale, self.ratio, self.flip_probability)
        return CropBoxes(*(each.unflatten(0, uniform.shape[:2]) for each in places))

    def cut(self, image: Images, source_size: Float[Tensor, "B 2"], places: CropBoxes) -> Tensor:
        """Pixels of the crops (V, B, C, size, size), as `cut_crops` gives them."""
        return cut_crops(image, source_size, places, self.size, self.filter)


def cut_crops(
    image: Images, source_size: Float[Tensor, "B 2"], places: CropBoxes, size: int, filter: Filter = "bicubic"
) -> Float[Tensor, "V B C size size"] | UInt8[Tensor, "V B C size size"]:
    """Cut crops out of images, resize and mirror them; every pixel is resampled once.

    Args:
        image: Images as bytes: a stack (B, C, H, W) of one size, or a list of any sizes.
        source_size: Height and width of the images that `places` are meant for. Where a stack has another size, the
            places are stretched to it.
        places: Crops (V, B); of a list of images at whole pixels.
        size: Height and width of the result.
        filter: Of the antialiased resampling.

    Returns:
        Of a stack, floats in [0, 1]; of a list, bytes, rounded as PIL rounds them.
    """
    if isinstance(image, Tensor):
        return _cut_stack(image, source_size, places, size, filter)
    views, count = places.flip.shape
    crops = empty_images((views, count), image[0].shape[0], size)
    for number, picture in enumerate(image):
        boxes, mirrored = places.boxes_xyxy[:, number].round().long().tolist(), places.flip[:, number].tolist()
        for view, (left, top, right, bottom) in enumerate(boxes):
            pixels = picture[None, :, top:bottom, left:right]
            crop = F.interpolate(pixels, (size, size), mode=filter, antialias=True)[0]
            crops[view, number] = crop.flip(2) if mirrored[view] else crop
    return crops


def _cut_stack(image: Tensor, source_size: Tensor, places: CropBoxes, size: int, filter: Filter) -> Tensor:
    views, images = places.flip.shape
    boxes = scale_boxes(places.boxes_xyxy, source_size.float(), image.shape[-2:])
    crops = torch.empty(views, images, image.shape[1], size, size, device=image.device)
    for part in _parts(crops):
        count = len(image[part])
        source = torch.arange(count, device=image.device).repeat(views)  # the image of each crop
        flat = (boxes[:, part].flatten(0, 1), places.flip[:, part].flatten())
        crops[:, part] = resample_crops(image[part], source, *flat, size, filter).unflatten(0, (views, count))
    return crops


def color_crops(
    crops: Float[Tensor, "V B C H W"] | UInt8[Tensor, "V B C H W"],
    recipes: Sequence[Recipe],
    color_draws: Float[Tensor, "V B draws"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Tensor, "V B C H W"]:
    """Recolour and normalise.

    Args:
        crops: Bytes, or floats in [0, 1].
        recipes: Colours of each view.
        color_draws: `DRAWS_PER_COLOR` numbers in [0, 1) per crop.
        mean: Of the channels.
        std: Of the channels.
    """
    finished = torch.empty(crops.shape, device=crops.device)
    for part in _parts(crops):
        finished[:, part] = normalize(recolor(as_floats(crops[:, part]), recipes, color_draws[:, part]), mean, std)
    return finished


def pixel_map(recipes: Sequence[Recipe], shape: Sequence[int], uniform: Float[Tensor, "V B draws"]) -> PixelMap | None:
    """Where recipes move the pixels of crops to, views one after the other; None where all stay at their places.

    Args:
        recipes: Of each view.
        shape: Channels, height and width of the crops.
        uniform: As for the colours.
    """
    if not any(isinstance(recipe, KorniaRecipe) and recipe.moves_pixels for recipe in recipes):
        return None
    channels, height, width = shape
    images = (uniform.shape[1], channels, height, width)
    maps = [
        recipe.pixel_map(images, numbers) if isinstance(recipe, KorniaRecipe) else unmoved(images, uniform.device)
        for recipe, numbers in zip(recipes, uniform, strict=True)
    ]
    return joined(maps)


def as_floats(pixels: Tensor) -> Tensor:
    """Bytes as floats in [0, 1], a copy; floats as they are."""
    if pixels.is_floating_point():
        return pixels.float()  # a trainer in float64 converts batches
    return torch.empty(pixels.shape, device=pixels.device).copy_(pixels).div_(255)


def _parts(crops: Tensor) -> list[slice]:
    """The images of crops (V, B, C, H, W) in groups that are worked on together."""
    images = crops.shape[1]
    if crops.numel() == 0:
        return []
    pixels = crops.shape[0] * crops.shape[-2] * crops.shape[-1]
    at_once = max(1, _PIXELS_AT_ONCE // pixels) if crops.device.type == "cpu" else images
    return [slice(start, start + at_once) for start in range(0, images, at_once)]


def crop_draws(draws: Draws, index: Int[Tensor, "B"], stream: int, views: int) -> Float[Tensor, "V B draws"]:
    """The numbers that decide where V crops of every image lie."""
    return _view_draws(draws, index, stream, views)[..., :DRAWS_PER_CROP]


def color_draws(draws: Draws, index: Int[Tensor, "B"], stream: int, views: int) -> Float[Tensor, "V B draws"]:
    """The numbers that decide the colours of the same crops."""
    return _view_draws(draws, index, stream, views)[..., DRAWS_PER_CROP:]


def _view_draws(draws: Draws, index: Tensor, stream: int, views: int) -> Tensor:
    count = DRAWS_PER_CROP + DRAWS_PER_COLOR
    return draws.uniform(index, stream, views * count).unflatten(1, (views, count)).transpose(0, 1)


def whole_image(source_size: Float[Tensor, "B 2"], flip: Bool[Tensor, "V B"]) -> CropBoxes:
    """The whole of every image as its only crop."""
    height, width = source_size.float().unbind(1)
    zero = torch.zeros_like(height)
    return CropBoxes(torch.stack([zero, zero, width, height], dim=1).expand(*flip.shape, 4), flip)


def check_channels(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse a normalisation that cannot be.

    Raises:
        ValueError: If `std` is not positive, or of another number of channels than `mean`.
    """
    if len(mean) != len(std) or not mean:
        raise ValueError(f"`mean` and `std` must have a number for every channel, got {mean} and {std}.")
    if min(std) <= 0:
        raise ValueError(f"`std` must be positive in every channel, got {std}.")


def check_recipes(recipes: Sequence[Recipe], mean: Sequence[float], follows: str | None = None) -> None:
    """Refuse recipes that cannot be.

    Args:
        recipes: Of all views.
        mean: One number per channel.
        follows: What must follow where pixels are moved; None: nothing.

    Raises:
        ValueError: If colours of other than 3 channels are to be changed, or pixels are moved nobody knows where to.
    """
    for recipe in recipes:
        if isinstance(recipe, KorniaRecipe):
            if follows:
                recipe.check_can_follow(follows)
        else:
            recipe.check_channels(len(mean))


def check_count(counts: Mapping[str, int]) -> None:
    """Refuse numbers of crops below 0."""
    for name, value in counts.items():
        if value < 0:
            raise ValueError(f"`{name}` must be at least 0 (0: none), got {value}.")
