"""What numbers are called, and how to read them."""

import re

_SCORES = {
    "knn_top1": ("k-NN, top 1", ""),
    "knn_top5": ("k-NN, top 5", ""),
    "linear_top1": ("Linear probe, top 1", ""),
    "linear_miou": ("Linear probe, mean IoU", ""),
    "linear_accuracy": ("Linear probe, accuracy", ""),
    "low_shot_top1": ("Low-shot probe, top 1", "few labels per class, mean over draws"),
    "low_shot_std": ("Low-shot probe, deviation", "over draws"),
}
_QUALITY = {
    "rankme": ("RankMe", "effective rank of the features; higher is better"),
    "alpha_req": (
        "alpha-ReQ",
        "decay of their spectrum, ranks 6 to 100; larger: few directions, smaller: noise; its authors find 1 best",
    ),
    "stable_rank": ("Stable rank", "how many directions carry the energy; higher is richer"),
    "uniformity": ("Uniformity", "spread over the sphere; 0 is collapsed, lower is better"),
    "clid_dimension": ("CLID, dimension", "intrinsic dimension; higher is more expressive"),
    "clid_learnability": ("CLID, learnability", "how soon clusters are learnt; higher is better"),
}
DASH = "\N{EN DASH}"
_ACCURACY = re.compile(r"(^|_)(knn|linear|low_shot|miou|iou|accuracy|top\d)")


def is_quality(score: str) -> bool:
    """Whether a score needs no labels."""
    return score in _QUALITY


def is_percent(score: str) -> bool:
    """Whether a score is a fraction that is told in percent."""
    return bool(_ACCURACY.search(score))


def name_of(score: str) -> tuple[str, str]:
    """Name and reading of a score."""
    if found := re.fullmatch(r"knn(\d+)_top1", score):
        return f"k-NN, top 1, k = {found[1]}", ""
    return _SCORES.get(score) or _QUALITY.get(score) or (score.replace("_", " ").replace(" iou", " IoU"), "")


def number(score: str, value: float | None, sign: str = "") -> str:
    """A value as text; a dash for none. `sign` "+" is for changes."""
    if value is None:
        return DASH
    text = f"{100 * value:{sign}.1f}" + " %" * (not sign) if is_percent(score) else f"{value:{sign}.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the two largest that there are."""
    hours, minutes, rest = int(seconds // 3600), int(seconds // 60 % 60), int(seconds % 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
