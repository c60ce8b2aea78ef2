"""What an encoder holds for alike, as a picture."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ssl_distill.callbacks.pictures import are_images, draws_pictures, harmless, publish
from ssl_distill.callbacks.views_picture import picture_table
from ssl_distill.evaluate.features import encode

_CELL = 96  # pixels of an image in the picture
_FRAME = 5  # pixels of the frame that tells whether a neighbour is of the query's class
_SAME, _OTHER = (0.13, 0.55, 0.95), (0.95, 0.55, 0.1)  # blue and orange, which all eyes tell apart


class Neighbours(Callback):
    """Draws the nearest images of the same few queries, before training and now, at every validation.

    Near is a high cosine of the first encoder's features. Neighbours are sought among the first images of the bank, of
    which only small copies are kept. Where classes are known, neighbours of the query's class have a blue frame, others
    an orange one. `neighbours.png` is in the run folder; loggers that take pictures get it too. Encoders that take no
    images are skipped.

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
            queries, bank = (normalize(torch.cat(side.features).float(), dim=1) for side in (self._queries, self._bank))
            found = (queries @ bank.T).topk(min(self.num_neighbours, len(bank)), dim=1).indices.cpu()
            if self.first_found is None or self.first_found[1].shape != found.shape:
                self.first_found = (trainer.global_step, found)
            publish(trainer, "neighbours", lambda path: self._draw(trainer.global_step, found, path))
        self._bank, self._queries = _Images(0), _Images(0)

    def _draw(self, step: int, found: Int[Tensor, "Q k"], path: Path) -> None:
        """Queries, their neighbours at first, and now."""
        assert self.first_found is not None
        columns = [("query", list(_cells(torch.cat(self._queries.images))))]
        blocks = [self.first_found, (step, found)] if self.first_found[0] != step else [self.first_found]
        for at_step, positions in blocks:
            for rank in range(positions.shape[1]):
                title = f"step {at_step:,}" if rank == 0 else ""
                columns.append((title, self._framed(positions[:, rank])))
        picture_table(columns).save(path)

    def _framed(self, positions: Int[Tensor, "Q"]) -> list[Float[Tensor, "3 S S"]]:
        labels, own = torch.cat(self._bank.labels)[positions], torch.cat(self._queries.labels)
        framed = []
        images = _cells(torch.cat(self._bank.images)[positions])
        for image, label, right in zip(images, labels, own, strict=True):
            if label < 0 or right < 0:
                framed.append(image)
                continue
            frame = torch.tensor(_SAME if label == right else _OTHER).view(3, 1, 1).expand_as(image).clone()
            frame[:, _FRAME:-_FRAME, _FRAME:-_FRAME] = image[:, _FRAME:-_FRAME, _FRAME:-_FRAME]
            framed.append(frame)
        return framed


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
        known = isinstance(label, Tensor) and label.ndim == 1
        self.labels.append(label[: len(image)].cpu() if known else torch.full((len(image),), -1))  # type: ignore[index]
        self.missing -= len(image)
