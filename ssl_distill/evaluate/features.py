"""Features of frozen encoders: collected once, read by every evaluator."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_distill.data.batch import LabelledBatch
from ssl_distill.distributed import gather_rows, max_over_ranks


class Features(NamedTuple):
    """One row per image, sorted by index.

    Attributes:
        features: Outputs of an encoder, float32 or better.
        labels: Classes, any integers from 0 on; -1 where unknown.
        index: Position of each image in its data set.
    """

    features: Float[Tensor, "N D"]
    labels: Int[Tensor, "N"]
    index: Int[Tensor, "N"]  # type: ignore[assignment]  # tuples have a method of this name; batches are alike

    def labelled(self) -> "Features":
        """The rows whose label is known."""
        known = self.labels >= 0
        return self if bool(known.all()) else Features(*(column[known] for column in self))


class FeatureBank:
    """Collects features batch by batch, on all ranks, and counts no image twice.

    Accuracies over images are means of its rows: torchmetrics does not know which image a row is of, and would count
    twice what a distributed sampler pads with.

    Args:
        device: Where a rank that sees no batch takes part in the gathering from; None is torch's default device.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._batches: list[Features] = []

    def update(self, features: Float[Tensor, "B D"], labels: Int[Tensor, "B"], index: Int[Tensor, "B"]) -> None:
        """Add one batch of this rank; half precision is kept as float32."""
        features = features.detach().to(torch.promote_types(features.dtype, torch.float32))
        self._batches.append(Features(features, labels.to(features.device), index.to(features.device)))

    def compute(self) -> Features:
        """Features of all ranks; duplicates of an index, as distributed samplers pad with, are dropped.

        Raises:
            ValueError: If nothing was collected on any rank, or a feature is not finite.
        """
        features, labels, index = (gather_rows(column) for column in self._of_this_rank())
        if not len(index):
            raise ValueError("no features were collected; is the evaluation loader empty?")
        index, order = index.sort(stable=True)
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        kept = Features(features[order[first]], labels[order[first]], index[first])
        broken = ~kept.features.isfinite().all(dim=1)
        if bool(broken.any()):
            raise ValueError(
                f"features of {int(broken.sum())} of {len(broken)} images are not finite, the first at index"
                f" {int(kept.index[broken][0])}; did training diverge, or is an input image not finite?"
            )
        return kept

    def _of_this_rank(self) -> Features:
        if self._batches:
            columns = (torch.cat(column) for column in zip(*self._batches, strict=True))
            features, labels, index = columns
        else:
            features = torch.empty(0, 0, device=self._device)
            labels = index = torch.empty(0, dtype=torch.int64, device=self._device)
        width = int(max_over_ranks(torch.tensor(features.shape[1], device=features.device)))
        return Features(features if len(index) else features.new_empty(0, width), labels, index)


def extract_features(
    encoder: nn.Module, loader: Iterable[LabelledBatch], prepare: Callable[[Tensor], Tensor]
) -> Features:
    """Features of every image of a loader, in plain PyTorch: eval mode, no gradient, no autocast.

    Args:
        encoder: From prepared images (B, 3, H, W) to features (B, D). Batches are moved to its device.
        loader: Yields `LabelledBatch`.
        prepare: From RGB bytes to what the encoder eats, usually scaled to [0, 1] and normalised.
    """
    parameter = next(encoder.parameters(), None)
    device = None if parameter is None else parameter.device
    bank = FeatureBank(device)
    for batch in loader:
        images = batch.image if device is None else batch.image.to(device)
        bank.update(encode(encoder, prepare(images)), batch.label, batch.index)
    return bank.compute()


@torch.no_grad()
def encode(encoder: nn.Module, images: Float[Tensor, "B *shape"]) -> Float[Tensor, "B D"]:
    """Features of one batch: eval mode, no gradient, no autocast; the encoder is left in the mode it was in.

    Raises:
        ValueError: If the encoder returns anything but one row per image.
    """
    with evaluating(encoder), torch.autocast(images.device.type, enabled=False):
        features = encoder(images)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"`encoder` must return features of shape ({len(images)}, D), got {got};"
            " timm models do so with num_classes=0."
        )
    return features


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, afterwards every submodule's own mode again."""
    were_training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in were_training:
            part.training = True


def contiguous_labels(bank: Features, query: Features) -> tuple[Int[Tensor, "N"], Int[Tensor, "Q"], int]:
    """Labels as 0 ... C - 1, defined by the classes of the bank; a query's unknown class becomes -1.

    Returns:
        Labels of the bank, labels of the queries, number of classes.
    """
    classes, bank_labels = bank.labels.unique(return_inverse=True)
    query_labels = torch.searchsorted(classes, query.labels).clamp(max=len(classes) - 1)
    query_labels = torch.where(classes[query_labels] == query.labels, query_labels, -1)
    return bank_labels, query_labels, len(classes)
