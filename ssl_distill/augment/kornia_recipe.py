"""Anybody's kornia pipeline in the place of a `ColorRecipe`, with the guarantees of ours."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import kornia.augmentation as K
import torch
from jaxtyping import Float, Int
from kornia.augmentation.auto.operations import OperationBase
from kornia.augmentation.container.base import ImageSequentialBase
from kornia.constants import SamplePadding
from torch import Tensor, nn

from ssl_distill.augment.pixel_map import PixelMap
from ssl_distill.augment.row_draws import DrawForBatch, RowDraws, image_keys
from ssl_distill.draws import Draws

_STILL = ("kornia.filters.", "kornia.color.", "kornia.enhance.", "torch.nn.")
"""Where modules come from that draw nothing by kornia's rules, and leave every pixel at its place."""


class KorniaRecipe:
    """A kornia pipeline for the views of one kind: it takes crops in [0, 1] and gives crops of the same size.

    What happens to a crop follows from its own random numbers, whatever else is in the batch, and torch's generators
    are left as they were. Parameters are drawn for all crops at once where every draw of the pipeline has a row per
    image; else, as for kornia's `ColorJitter` (one order per batch), `random_apply` or `RandAugment`, crop by crop,
    which is slow. `p_batch` then is a share of crops.

    Where a pipeline moves pixels (rotation, elastic, ...), `pixel_map` says where to.

    Args:
        pipeline: A module of `kornia.augmentation`, a container of such, or a list of modules for one after another.
    """

    def __init__(self, pipeline: nn.Module | list[nn.Module]) -> None:
        # kornia's containers are Sequential too, but know more than an order.
        plain = isinstance(pipeline, Sequence) or type(pipeline) is nn.Sequential
        modules: list[Any] = list(pipeline) if plain else [pipeline]  # type: ignore[arg-type]
        self.pipeline = K.ImageSequential(*modules)
        self._row_draws: dict[tuple[int, ...], bool] = {}
        for module in self.pipeline.modules():
            name = type(module).__name__
            if isinstance(module, K.MixAugmentationBaseV2):
                raise ValueError(f"`pipeline` must not mix images, views are of one image each; leave out {name}.")
            if isinstance(module, K.AugmentationBase2D) and module.same_on_batch and _draws(module):
                raise ValueError(f"`pipeline` must draw for every image of its own; {name} has `same_on_batch`=True.")

    def __repr__(self) -> str:
        return f"KorniaRecipe({self.pipeline})"

    @property
    def moves_pixels(self) -> bool:
        """Whether pixels may change their places."""
        return any(moves or moves is None for _, moves in self._movers())

    def check_can_follow(self, what: str) -> None:
        """Refuse pipelines that move pixels in a way that `pixel_map` does not know.

        Args:
            what: Has to follow the pixels.

        Raises:
            ValueError: If there is such a module.
        """
        for name, moves in self._movers():
            if moves is None:
                raise ValueError(
                    f"`pipeline` has {name}, of which nobody knows whether it moves pixels, and {what} must follow"
                    " them; take a module of kornia.augmentation."
                )

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B C H W"], uniform: Float[Tensor, "B draws"]) -> Float[Tensor, "B C H W"]:
        """Changed images.

        Args:
            images: In [0, 1].
            uniform: At least two numbers in [0, 1) per image; they alone decide what happens to it.

        Raises:
            ValueError: If a module cannot change images of this shape, or changes it.
        """
        return self._run(images.shape, uniform, lambda rows, params: self.pipeline(images[rows], params=params))

    @torch.no_grad()
    def pixel_map(self, shape: tuple[int, int, int, int], uniform: Float[Tensor, "B draws"]) -> PixelMap:
        """Where the pixels of such images go under the same numbers.

        Args:
            shape: Of the images: B, C, H, W.
            uniform: As for the images themselves.
        """
        self.check_can_follow("a pixel map")
        batch, _, height, width = shape
        x, y = ((torch.arange(size, device=uniform.device) + 0.5) / size for size in (width, height))
        own = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width), torch.ones_like(x).expand(height, -1)])
        own = own.expand(batch, -1, -1, -1)
        moved = self._run(shape, uniform, lambda rows, params: _move(self.pipeline, params, own[rows]))
        # Pixels that nothing shows come out as zeros: the share that is not blends in at borders, and is divided out.
        share = moved[:, 2:]
        size = torch.stack([torch.full_like(x[0], width), torch.full_like(x[0], height)])
        return PixelMap(moved[:, :2] / share.clamp(min=1e-3) * size[:, None, None], share[:, 0] > 0.5)

    def _run(self, shape: Sequence[int], uniform: Tensor, work: Callable[[slice, Any], Tensor]) -> Tensor:
        """Draw parameters, for all images at once or one by one, and work with them."""
        self.pipeline.to(uniform.device)
        keys = image_keys(uniform)
        if not len(keys):
            return uniform.new_empty(tuple(shape))
        kind = tuple(shape[1:])
        if kind not in self._row_draws:
            self._row_draws[kind] = self._probe(kind, uniform.device)
        return (self._at_once if self._row_draws[kind] else self._one_by_one)(kind, keys, work)

    def _at_once(self, kind: tuple[int, ...], keys: Int[Tensor, "B"], work: Callable[[slice, Any], Tensor]) -> Tensor:
        with RowDraws(keys):
            return work(slice(None), self.pipeline.forward_parameters(torch.Size((len(keys), *kind))))

    def _one_by_one(
        self, kind: tuple[int, ...], keys: Int[Tensor, "B"], work: Callable[[slice, Any], Tensor]
    ) -> Tensor:
        results = []
        with _forked(keys.device):
            for number, key in enumerate(keys.tolist()):
                torch.random.default_generator.manual_seed(key)
                if keys.device.type == "cuda":
                    torch.cuda.manual_seed(key)
                params = self.pipeline.forward_parameters(torch.Size((1, *kind)))
                results.append(work(slice(number, number + 1), params))
        return torch.cat(results)

    def _probe(self, kind: tuple[int, ...], device: torch.device) -> bool:
        """Whether every draw of the pipeline has a row per image, found by trying.

        Raises:
            ValueError: If a module cannot change such images, or gives another size.
        """
        uniform = Draws(0, 0).uniform(torch.arange(3, device=device), 0, math.prod(kind))
        images, keys = uniform.view(3, *kind), image_keys(uniform)

        def change(rows: slice, params: Any) -> Tensor:
            return self.pipeline(images[: len(keys)][rows], params=params)

        try:
            changed = self._one_by_one(kind, keys, change)
        except Exception as error:  # kornia refuses with many types
            raise ValueError(self._reason(images, error)) from error
        if changed.shape != images.shape:
            raise ValueError(
                f"`pipeline` must keep the size of its images, {kind} became {tuple(changed.shape[1:])}; the size of"
                " crops is set where they are cut."
            )
        try:
            three = self._at_once(kind, keys, change)
            keys = keys[:2]
            return torch.allclose(self._at_once(kind, keys, change), three[:2], atol=1e-4)
        except DrawForBatch:
            return False

    def _reason(self, images: Tensor, error: Exception) -> str:
        """Which module cannot change such images, and why."""
        channels, height, width = images.shape[1:]
        for module in _leaves(self.pipeline):
            with _forked(images.device):
                try:
                    module(images)
                except Exception as own_error:
                    line = str(own_error).strip().splitlines()[0]
                    return (
                        f"{type(module).__name__} of `pipeline` cannot change images of {channels} channels and"
                        f" {height} x {width} pixels: {line}"
                    )
        return f"`pipeline` fails on images of {channels} channels and {height} x {width} pixels: {error}"

    def _movers(self) -> Iterator[tuple[str, bool | None]]:
        """Of every module that does something, its name and whether it moves pixels; None where nobody knows."""
        for module in _leaves(self.pipeline):
            yield type(module).__name__, _moves(module)
        for module in self.pipeline.modules():
            if isinstance(module, K.PatchSequential):
                yield type(module).__name__, None


def _draws(module: K.AugmentationBase2D) -> bool:
    """Whether a module that treats all images alike draws anything; kornia's `Normalize` does not."""
    try:
        with RowDraws(torch.arange(2)):
            module.forward_parameters((2, 3, 64, 64))
    except DrawForBatch:
        return True
    return False


def _forked(device: torch.device) -> Any:
    """Leaves the generators as they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _leaves(container: nn.Module) -> Iterator[nn.Module]:
    """The modules of a pipeline without its containers."""
    for module in container.children():
        if isinstance(module, ImageSequentialBase):
            yield from _leaves(module)
        else:
            yield module.op if isinstance(module, OperationBase) else module


def _moves(module: nn.Module) -> bool | None:
    """Whether a module changes the places of pixels; None where nobody knows."""
    if isinstance(module, K.IntensityAugmentationBase2D):
        return False
    if isinstance(module, K.AugmentationBase2D):
        return True
    return False if type(module).__module__.startswith(_STILL) else None


def _move(container: nn.Module, params: list[Any], picture: Tensor) -> Tensor:
    """Do to a picture only what changes the places of its pixels."""
    for item in params:
        module: Any = container.get_submodule(item.name)
        if isinstance(module, ImageSequentialBase):
            picture = _move(module, item.data, picture)
        elif isinstance(module, OperationBase):
            picture = module(picture, params=item.data) if _moves(module.op) else picture
        elif _moves(module):
            # A colour that fills what is empty is no place: the picture stays empty there.
            filled = module.flags.get("padding_mode") is SamplePadding.FILL
            picture = module(picture, params=item.data, **({"padding_mode": SamplePadding.ZEROS} if filled else {}))
    return picture
