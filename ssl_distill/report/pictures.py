"""What the runs drew."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ssl_distill.report.runs import PICTURES, Run

_QUALITIES = (90, 75, 55)
_MOST_BYTES = 3_000_000  # of all pictures together; as base64 4 MB
_PICTURES = {
    "views": ("Views", "One row per image: the source, then what the augmentation made of it for the network."),
    "pca": (
        "Features of places",
        "The three main components of patch tokens, or of a ConvNet's map, as red, green and blue, over training."
        " Places of one colour are alike to the network.",
    ),
    "attention": ("Attention", "Where the class token looks in the last block, mean over heads, over training."),
    "neighbours": (
        "Nearest neighbours",
        "Images whose features are nearest to a query's, before training and at the end. Where classes are known, a"
        " blue frame is the query's class and an orange one another.",
    ),
    "pairs": ("Points and pixels", "Points of a scan over the camera's picture that they are paired with."),
    "birdseye": (
        "A scan from above",
        "Classes, predictions and features of a query scan; alike colours mean like features.",
    ),
}


class Drawn(NamedTuple):
    """One picture.

    Attributes:
        run: Number of the run that drew it.
        source: The picture itself, as a data URI.
    """

    run: int
    source: str


class Kind(NamedTuple):
    """Pictures of one kind.

    Attributes:
        title: What they are.
        text: How to read them.
        drawn: At least one, by run.
    """

    title: str
    text: str
    drawn: list[Drawn]


def pictures(runs: Sequence[Run]) -> list[Kind]:
    """What the runs drew, kind by kind."""
    count = sum(len(run.pictures) for run in runs)
    kinds = []
    for name in PICTURES:
        drawn = [
            Drawn(i, embedded(run.pictures[name], _MOST_BYTES // count))
            for i, run in enumerate(runs)
            if name in run.pictures
        ]
        if drawn:
            kinds.append(Kind(*_PICTURES[name], drawn))
    return kinds


def embedded(path: Path, most_bytes: int) -> str:
    """A picture as a data URI of at most so many bytes before encoding: coarser, then smaller, as far as it must be."""
    with Image.open(path) as picture:
        image = picture.convert("RGB")
    while True:
        for quality in (None, *_QUALITIES):
            content = io.BytesIO()
            image.save(content, "WEBP", method=2, lossless=quality is None, quality=quality or 0)
            if content.tell() <= most_bytes or min(image.size) < 64:
                return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
        image = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS)
