"""What a frozen teacher makes of views: computed, or kept on disk."""

import hashlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ssl_distill.callbacks.atomic import replacing
from ssl_distill.heads.network import per_view
from ssl_distill.views import TwoViews

_DAMAGED = (OSError, ValueError, KeyError, EOFError, BadZipFile)


def computed_maps(teacher: nn.Module, views: TwoViews) -> Float[Tensor, "2 B C h w"]:
    """Maps of both views."""
    return per_view(teacher, views.images)


class CachedMaps:
    """Maps of both views as `computed_maps` gives them, in half precision, from disk where they were made before.

    Worth its disk where views come again: with `RepeatedViews`, or when another student of the same teacher is trained
    with the same seed. An image takes 4 * C * h * w bytes for every epoch of different views.

    A file is found by the teacher's fingerprint, the run's seed, the epoch and the image's number. It also knows what
    its views look like, so that other data or another augmentation do not get its maps; they replace them. A file that
    is damaged is made again. Runs and ranks may share a folder. Maps that were just made are rounded as well: a run is
    the same with an empty cache and with a full one.

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._of_teacher: tuple[nn.Module, Path] | None = None

    @torch.no_grad()
    def __call__(self, teacher: nn.Module, views: TwoViews) -> Float[Tensor, "2 B C h w"]:
        """Maps of both views, in float32 or in the images' precision if that is higher."""
        files = self._files(teacher, views.origin)
        looks = F.adaptive_avg_pool2d(views.images.flatten(0, 1).float(), 2).unflatten(0, (2, -1)).transpose(0, 1)
        looks = looks.cpu()  # (B, 2, 3, 2, 2)
        kept = [_read(file, look) for file, look in zip(files, looks, strict=True)]
        missing = [i for i, maps in enumerate(kept) if maps is None]
        if missing:
            made = computed_maps(teacher, views._replace(images=views.images[:, missing])).float()
            for i, maps in zip(missing, made.cpu().unbind(1), strict=True):
                kept[i] = _write(files[i], looks[i], maps)
        maps = torch.stack([_restored(each) for each in kept if each is not None], dim=1)
        return maps.to(views.images.device, torch.promote_types(views.images.dtype, torch.float32))

    def _files(self, teacher: nn.Module, origin: Tensor) -> list[Path]:
        if self._of_teacher is None or self._of_teacher[0] is not teacher:
            self._of_teacher = (teacher, self.folder / fingerprint(teacher))
        folder = self._of_teacher[1]
        # A thousand images per folder: file systems are slow with millions of files in one.
        return [
            folder / f"seed{seed}_epoch{epoch}" / str(index // 1000) / f"{index}.npz"
            for seed, epoch, index in origin.tolist()
        ]


def _read(file: Path, look: Float[Tensor, "2 3 2 2"]) -> dict[str, Any] | None:
    """What is in a file; None if there is none, if it is damaged, or of other views."""
    try:
        with open(file, "rb") as opened, np.load(opened) as content:  # zip's checksums find what is torn
            kept = dict(content)
        same = np.allclose(kept["look"], look.numpy(), rtol=0, atol=1e-3)  # rounding differs between machines
        return {name: kept[name] for name in ("half", "largest")} if same else None
    except _DAMAGED:
        return None


def _write(file: Path, look: Float[Tensor, "2 3 2 2"], maps: Float[Tensor, "2 C h w"]) -> dict[str, Any]:
    """Keep maps as shares of their largest value, which half precision holds whatever their scale."""
    largest = maps.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    content = {"half": (maps / largest).half().numpy(), "largest": largest.numpy()}
    with replacing(file, durable=False) as temporary:  # a cache may lose a file, and a torn one is noticed
        np.savez(temporary, look=look.numpy(), **content)  # type: ignore[arg-type]
    return content


def _restored(content: dict[str, Any]) -> Float[Tensor, "2 C h w"]:
    return torch.from_numpy(content["half"]).float() * torch.from_numpy(content["largest"])


def fingerprint(module: nn.Module) -> str:
    """Hash of all weights and buffers, the same on every device and in every precision that holds them exactly."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]
