"""What becomes of samples that cannot be read: one rule for all data sets."""

import logging
from collections.abc import Callable
from itertools import chain
from typing import Literal, TypeVar, get_args

import torch

log = logging.getLogger(__name__)

OnCorrupt = Literal["skip", "error"]
Sample = TypeVar("Sample")

_TOLERATED = 10  # unreadable samples that also a small data set may have


class Useless(ValueError):
    """A sample was read well and shows nothing to train on this time. There is no limit to these."""


class Replacement:
    """Reads samples by position, and the next one in the place of each that cannot be read.

    What is read for a position follows from the files alone, never from what was read before: a resumed run reads the
    same.

    Args:
        count: Samples of the data set.
        on_corrupt: "skip" names an unreadable sample once, counts it and reads the next one in its place, and stops
            when more than 10 samples and 1 % of all are unreadable; "error" stops at the first.
        kind: What errors call samples.

    Raises:
        ValueError: If `on_corrupt` is neither.
    """

    def __init__(self, count: int, on_corrupt: OnCorrupt, kind: str = "files") -> None:
        check_on_corrupt(on_corrupt)
        self.count = count
        self.on_corrupt = on_corrupt
        self.kind = kind
        # One for all loader processes.
        self.corrupt = torch.zeros(count, dtype=torch.bool).share_memory_()
        self.num_useless = torch.zeros(1, dtype=torch.long).share_memory_()

    def read(
        self, position: int, read: Callable[[int], Sample], fits: Callable[[int], bool] | None = None
    ) -> tuple[Sample, int]:
        """The sample at this position, or else the next one that can be read; and its position.

        Args:
            position: What is asked for.
            read: Position to sample. An `OSError` or a `ValueError` of it says that the sample is corrupt.
            fits: Positions that may be read in the place of another; None for all.

        Raises:
            OSError: If no sample can be read, too many cannot, or "error" is asked for.
        """
        last: Exception | None = None
        for used in chain(range(position, self.count), range(position)):
            if used != position and fits is not None and not fits(used):
                continue
            try:
                return read(used), used
            except Useless as error:
                self.num_useless += 1
                log.warning("%s; replaced by the next (%d so far)", error, int(self.num_useless))
                last = error
            except (OSError, ValueError) as error:
                self.note(used, error)
                last = error
        raise OSError(f"none of {self.count} {self.kind} can be used, the last: {last}") from last

    def note(self, position: int, error: Exception) -> None:
        """Name and count a sample that cannot be read.

        Raises:
            OSError: If there are too many of them, or "error" is asked for.
        """
        if self.on_corrupt == "error":
            raise OSError(f"{_without_stop(error)}; remove it or set `on_corrupt` to skip.") from error
        if self.corrupt[position]:
            return
        self.corrupt[position] = True
        count = int(self.corrupt.sum())
        log.warning("corrupt: %d of %d %s so far: %s", count, self.count, self.kind, error)
        if count > max(_TOLERATED, self.count // 100):
            raise OSError(
                f"{count} of {self.count} {self.kind} are corrupt, more than 1 %, the last: {_without_stop(error)}."
            ) from error


def check_on_corrupt(on_corrupt: str) -> None:
    """Refuse what is no `OnCorrupt`."""
    if on_corrupt not in get_args(OnCorrupt):
        raise ValueError(f"`on_corrupt` must be one of {', '.join(get_args(OnCorrupt))}, got {on_corrupt}.")


def _without_stop(error: Exception) -> str:
    return str(error).removesuffix(".")
