"""All that was logged, as charts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ssl_distill.callbacks.curves import curve_panels
from ssl_distill.report.charts import Chart, Curve, chart
from ssl_distill.report.markup import COLORS
from ssl_distill.report.names import is_percent, is_quality, name_of
from ssl_distill.report.runs import Run

_GROUPS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("Loss", lambda key: key.startswith("train/") and key.count("/") == 1 and not _is_speed(key)),
    ("Scores", lambda key: key.startswith("val/") and not is_quality(key.rpartition("/")[2])),
    ("Quality without labels", lambda key: key.startswith("val/")),
    ("Health", lambda key: key.startswith("train/health/")),
    ("Schedules", lambda key: key.startswith("schedule/")),
    ("Speed", lambda key: _is_speed(key)),
    ("Others", lambda key: True),
)
_OPEN_GROUPS = ("Loss", "Scores", "Quality without labels")


class Curves(NamedTuple):
    """What the section shows.

    Attributes:
        encoders: By number of dash pattern.
        groups: Charts by the name of their group.
        open_groups: Groups whose charts are seen at first.
    """

    encoders: list[str]
    groups: dict[str, list[Chart]]
    open_groups: tuple[str, ...] = _OPEN_GROUPS


def curves(runs: Sequence[Run]) -> Curves | None:
    """All that was logged, in groups: a colour per run, a dash pattern per encoder; None if nothing was."""
    by_title = _by_title(runs)
    encoders = list(dict.fromkeys(encoder for drawn in by_title.values() for _, encoder, _ in drawn if encoder))
    groups: dict[str, list[Chart]] = {name: [] for name, _ in _GROUPS}
    for title, drawn in by_title.items():
        group = next(name for name, holds in _GROUPS if holds(title))
        lines = [
            Curve(_label(runs, i, encoder), i % COLORS, encoders.index(encoder) % 4 if encoder else 0, points)
            for i, encoder, points in drawn
        ]
        groups[group].append(chart(_name(title), lines, _is_percent(title, runs)))
    return Curves(encoders, {name: charts for name, charts in groups.items() if charts}) if by_title else None


def _by_title(runs: Sequence[Run]) -> dict[str, list[tuple[int, str, list[tuple[float, float]]]]]:
    """Number of the run, encoder and points of every curve by panel; scores in the order of their table."""
    found: dict[str, list[tuple[int, str, list[tuple[float, float]]]]] = {}
    for i, run in enumerate(runs):
        panels = curve_panels(run.metrics)
        for title, lines in panels.items():
            repeats = title.startswith("train/") and title != "train/loss" and lines == panels.get("train/loss")
            for encoder, points in lines.items() if not repeats else ():  # a method's only term is its loss
                found.setdefault(title, []).append((i, encoder, points))
    scores = (name for run in runs for of_encoder in run.scores().values() for name in of_encoder)
    order = {f"val/{name}": place for place, name in enumerate(dict.fromkeys(scores))}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], -1)))


def _name(title: str) -> str:
    if title == "val/score":
        return "validation score"
    last = title.rpartition("/")[2]
    return name_of(last)[0] if title.startswith("val/") else last.replace("_", " ")


def _is_percent(title: str, runs: Sequence[Run]) -> bool:
    if title == "val/score":
        return all(is_percent(next(iter(of_encoder))) for run in runs for of_encoder in run.scores().values())
    return title.startswith("val/") and is_percent(title.rpartition("/")[2])


def _label(runs: Sequence[Run], i: int, encoder: str) -> str:
    return " ".join(filter(None, (runs[i].name if len(runs) > 1 else "", encoder))) or runs[i].name


def _is_speed(key: str) -> bool:
    return key in ("train/images_per_s", "train/data_wait")
