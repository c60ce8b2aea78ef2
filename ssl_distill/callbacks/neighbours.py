"""What an encoder holds for alike, as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ssl_distill.callbacks.pictures import are_images, draws_pictures, first_of_each, harmless, publish
from ssl_distill.callbacks.views_picture import picture_table
from ssl_distill.evaluate.features import encode

_CELL = 96  # pixels of an image in the picture
_FRAME = 5  # pixels of the frame that tells whether a neighbour is of the query's class
_SAME, _OTHER = (0.13, 0.55, 0.95), (0.95, 0.55, 0.1)  # blue and orange, which all eyes tell apart


class Neighbours(Callback):
    """Draws the nearest images of the same few queries, before training and now, at every validation.

    Near is a high cosine of the first encoder's features. Neighbours are sought among the first images of the bank, of
    which only small copies are kept. Where classes of whole images are known, neighbours of the query's class have a
    blue frame, others an orange one. `neighbours.png` is in the run folder; loggers that take pictures get it too.
    Encoders that take no images are skipped.

    Args:
        picture_rows: Queries, the first of all; 0 for no picture.
        num_neighbours: Neighbours of each query.
        bank_size: Images that neighbours are sought among.
    """

    def __init__(self, picture_rows: int = 8, num_neighbours: int = 5, bank_size: int = 1000) -> None:
        for name, value, least in (
            ("picture_rows", picture_rows, 0),
            ("num_neighbours", num_neighbours, 1),
            ("bank_size", bank_size, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        self.picture_rows = picture_rows
        self.num_neighbours = num_neighbours
        self.bank_size = bank_size
        self.first_found: tuple[int, Int[Tensor, "Q k"]] | None = None
        self._bank, self._queries = _Images(0), _Images(0)

    def state_dict(self) -> dict[str, Any]:
        """The neighbours before training, as step and positions in the bank."""
        return {"first_found": self.first_found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with how the run of a checkpoint began."""
        self.first_found = state_dict["first_found"]

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start collecting."""
        wanted = bool(self.picture_rows) and draws_pictures(trainer, pl_module)
        self._bank, self._queries = _Images(wanted * self.bank_size), _Images(wanted * self.picture_rows)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Encode what of a batch is wanted; on all ranks, since weights may be sharded."""
        side = (self._bank, self._queries)[min(dataloader_idx, 1)]
        if side.missing and dataloader_idx < 2 and are_images(getattr(batch, "image", None)):
            with harmless("neighbours"):
                side.add(batch, next(iter(pl_module.encoders().values())), pl_module.prepare)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Find the neighbours, and draw them on the first rank."""
        if not self._bank.features or not self._queries.features:
            return
        with harmless("neighbours"):
            queries, bank = self._queries.each_once(), self._bank.each_once()
            similarity = normalize(queries.features, dim=1) @ normalize(bank.features, dim=1).T
            found = similarity.topk(min(self.num_neighbours, len(bank.features)), dim=1).indices.cpu()
            if self.first_found is None or self.first_found[1].shape != found.shape:
                self.first_found = (trainer.global_step, found)
            by_step = dict([self.first_found, (trainer.global_step, found)])
            publish(trainer, "neighbours", lambda path: _draw(queries, bank, by_step, path))
        self._bank, self._queries = _Images(0), _Images(0)


class _Seen(NamedTuple):
    """Images with their features and classes, -1 where there is none."""

    features: Float[Tensor, "B D"]
    images: UInt8[Tensor, "B 3 S S"]
    labels: Int[Tensor, "B"]


def _draw(queries: _Seen, bank: _Seen, found: Mapping[int, Int[Tensor, "Q k"]], path: Path) -> None:
    """Queries, and what was found for them in the bank at each step."""
    columns = [("query", list(_cells(queries.images)))]
    for step, positions in found.items():
        for rank, column in enumerate(positions.unbind(1)):
            framed = map(_framed, _cells(bank.images[column]), bank.labels[column].tolist(), queries.labels.tolist())
            columns.append((f"step {step:,}" if rank == 0 else "", list(framed)))
    picture_table(columns).save(path)


def _framed(image: Float[Tensor, "3 S S"], label: int, query_label: int) -> Float[Tensor, "3 S S"]:
    """In the colour of a right or wrong neighbour, if that is known."""
    if min(label, query_label) < 0:
        return image
    frame = torch.tensor(_SAME if label == query_label else _OTHER).view(3, 1, 1).expand_as(image).clone()
    frame[:, _FRAME:-_FRAME, _FRAME:-_FRAME] = image[:, _FRAME:-_FRAME, _FRAME:-_FRAME]
    return frame


def _cells(images: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 _ _"]:
    """Images in [0, 1] at the size of a cell."""
    return interpolate(images.float() / 255, (_CELL, _CELL), mode="bilinear", antialias=True)


class _Images:
    """The first images of a loader: features, small copies and labels."""

    def __init__(self, wanted: int) -> None:
        self.missing = wanted
        self.features: list[Tensor] = []
        self.images: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, batch: Any, encoder: torch.nn.Module, prepare: Any) -> None:
        image = batch.image[: self.missing]
        self.features.append(encode(encoder, prepare(image)))
        self.images.append((image if image.shape[2] <= _CELL else (255 * _cells(image)).byte()).cpu())
        label = getattr(batch, "label", None)
        known = isinstance(label, Tensor) and label.ndim == 1 and not hasattr(batch, "mask")  # not an object's
        self.labels.append(label[: len(image)].cpu() if known else torch.full((len(image),), -1))  # type: ignore[index]
        self.missing -= len(image)

    def each_once(self) -> _Seen:
        """All of them; one that comes once per object is kept once."""
        images = torch.cat(self.images)
        kept = first_of_each(images)
        return _Seen(torch.cat(self.features)[kept].float(), images[kept], torch.cat(self.labels)[kept])
