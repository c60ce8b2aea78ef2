"""Scores of the runs, with their baselines and protocols."""

from collections.abc import Sequence
from typing import NamedTuple

from ssl_distill.evaluate.report import protocol_lines
from ssl_distill.report.names import is_percent, is_quality, name_of, number
from ssl_distill.report.runs import Run


class Cell(NamedTuple):
    """A score of one encoder of one run, as text.

    Attributes:
        now: Its last value.
        before: Its value before training.
        change: The difference.
        kind: "up" where training made it better, "down" where worse, else empty.
    """

    now: str
    before: str
    change: str
    kind: str


class Row(NamedTuple):
    """One score.

    Attributes:
        label: Its name.
        hint: How to read it; may be empty.
        cells: One per column.
    """

    label: str
    hint: str
    cells: list[Cell]


class ScoreTable(NamedTuple):
    """Scores now, before training, and the change: a column per encoder of one run, or else per run.

    Attributes:
        title: May be empty.
        encoders: What the columns are; empty where they are the runs.
        groups: Rows by encoder; by an empty name where the columns are the encoders.
    """

    title: str
    encoders: list[str]
    groups: dict[str, list[Row]]


class Scores(NamedTuple):
    """What the section shows.

    Attributes:
        tables: Scores with labels, scores without.
        protocols: Names of the runs by the lines that tell how their numbers were made.
    """

    tables: list[ScoreTable]
    protocols: dict[tuple[str, ...], list[str]]


def evaluation(runs: Sequence[Run]) -> Scores | None:
    """Scores with labels, scores without, and how both were made; None if there are none."""
    if not any(run.scores() for run in runs):
        return None
    tables = [_scoretable(runs, False, ""), _scoretable(runs, True, "Quality without labels")]
    protocols: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        if run.protocol:
            protocols.setdefault(tuple(protocol_lines(run.protocol)), []).append(run.name)
    return Scores([table for table in tables if table.groups], protocols)


def _scoretable(runs: Sequence[Run], of_quality: bool, title: str) -> ScoreTable:
    scores = [run.scores() for run in runs]
    encoders = list(dict.fromkeys(encoder for of_run in scores for encoder in of_run))
    if len(runs) == 1:
        columns = {"": list(scores[0].values())}
    else:
        columns = {encoder: [of_run.get(encoder, {}) for of_run in scores] for encoder in encoders}
    groups = {}
    for encoder, per_column in columns.items():
        names = dict.fromkeys(name for each in per_column for name in each if is_quality(name) == of_quality)
        if names:
            groups[encoder] = [
                Row(*name_of(name), [_cell(name, *each.get(name, (None, None))) for each in per_column])
                for name in names
            ]
    return ScoreTable(title, encoders if len(runs) == 1 else [], groups)


def _cell(name: str, before: float | None, now: float | None) -> Cell:
    change = None if before is None or now is None else now - before
    text = number(name, change, "+")
    # Only accuracies have a side that is better for certain.
    judged = change is not None and is_percent(name) and not name.endswith("std") and text.strip("+0.\N{MINUS SIGN}")
    kind = ("up" if change > 0 else "down") if judged and change else ""
    return Cell(number(name, now), number(name, before), text, kind)
