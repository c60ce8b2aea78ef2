"""How an encoder comes to see images, as pictures over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn.functional import interpolate

from ssl_distill.callbacks.pictures import are_images, draws_pictures, first_of_each, harmless, publish
from ssl_distill.callbacks.views_picture import picture_table
from ssl_distill.evaluate.image_maps import image_maps, pca_colors

_CELL = 112  # pixels of an image in the picture
_MOST_COLUMNS = 8

Column = dict[str, Any]
"""`step` and, by name of the picture, maps (B, 3 or 1, h, w) in bytes."""


class FeatureMaps(Callback):
    """Draws what the first encoder makes of the same few images, before the first step and at every validation.

    `pca.png` shows the three main components of patch tokens (of a ConvNet: of its map) as colours, `attention.png`
    where a ViT's class token looks in the last block. A column per validation; when there are many, every second is
    dropped. Loggers that take pictures get them too. Encoders that are no image networks of timm's kind are skipped.

    Args:
        picture_rows: Images, the first of the queries, each once; 0 for no pictures.
    """

    def __init__(self, picture_rows: int = 6) -> None:
        if picture_rows < 0:
            raise ValueError(f"`picture_rows` must be at least 0 (0: no picture), got {picture_rows}.")
        self.picture_rows = picture_rows
        self.columns: list[Column] = []
        self._images: UInt8[Tensor, "B 3 S S"] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The maps so far: a resumed run shows how it began."""
        return {"columns": self.columns}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the maps of a checkpoint."""
        self.columns = state_dict["columns"]

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forget the images: loaders may have changed."""
        self._images = None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first queries."""
        image = getattr(batch, "image", None)
        wanted = dataloader_idx == 1 and self.picture_rows and draws_pictures(trainer, pl_module)
        if not wanted or not are_images(image):
            return
        if self._images is not None:
            if len(self._images) == self.picture_rows:
                return
            image = torch.cat([self._images, image])
        self._images = image[first_of_each(image)][: self.picture_rows]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Encode on all ranks, since weights may be sharded, and draw on the first."""
        if self._images is None:
            return
        with harmless("feature maps"):
            maps = image_maps(next(iter(pl_module.encoders().values())), pl_module.prepare(self._images))
            if maps is None:
                return
            before = self.columns[-1]["pca"] if self.columns else None
            column: Column = {"step": trainer.global_step, "pca": pca_colors(maps.features, before)}
            if maps.attention is not None:
                column["attention"] = _stretched(maps.attention)
            self.columns = _thinned([*(each for each in self.columns if each["step"] < trainer.global_step), column])
            for name in ("pca", "attention"):
                if name in column:
                    publish(trainer, name, lambda path, name=name: self._draw(name, path))  # type: ignore[misc]

    def _draw(self, name: str, path: Path) -> None:
        """Images, then a column of maps per step."""
        assert self._images is not None
        columns = [("image", list(_enlarged(self._images.float().cpu() / 255)))]
        for column in self.columns:
            if name in column:
                columns.append((f"step {column['step']:,}", list(_enlarged(_in_color(column[name])))))
        picture_table(columns).save(path)


def _stretched(attention: Float[Tensor, "B h w"]) -> UInt8[Tensor, "B 1 h w"]:
    """Each image's least attention as 0 and its most as 255."""
    low, high = attention.amin((1, 2), keepdim=True), attention.amax((1, 2), keepdim=True)
    return (255 * (attention - low) / (high - low).clamp(min=1e-12)).byte().cpu()[:, None]


def _in_color(maps: UInt8[Tensor, "B C h w"]) -> Float[Tensor, "B 3 h w"]:
    """Maps of one channel from dark to bright."""
    if maps.shape[1] == 3:
        return maps.float() / 255
    colors = matplotlib.colormaps["magma"](maps[:, 0].numpy())[..., :3].astype(np.float32)  # (B, h, w, 3)
    return torch.from_numpy(colors).movedim(-1, 1)


def _enlarged(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 _ _"]:
    """To the size of a cell; few pixels stay squares, which show how coarse a map is."""
    if max(images.shape[2:]) <= 2 * _CELL // 3:
        return interpolate(images, (_CELL, _CELL), mode="nearest-exact")
    return interpolate(images, (_CELL, _CELL), mode="bilinear", antialias=True)


def _thinned(columns: Sequence[Column]) -> list[Column]:
    """The first, the last, and every second between them while there are too many."""
    kept = list(columns)
    while len(kept) > _MOST_COLUMNS:
        kept = [*kept[:-1:2], kept[-1]]
    return kept
