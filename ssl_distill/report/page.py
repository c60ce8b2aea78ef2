"""One HTML page about one or several runs, with all it needs inside."""

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import ssl_distill
from ssl_distill.report.curves import curves
from ssl_distill.report.markup import TEMPLATES
from ssl_distill.report.names import duration, is_quality, name_of, number
from ssl_distill.report.pictures import pictures
from ssl_distill.report.runs import Run
from ssl_distill.report.scores import evaluation
from ssl_distill.report.settings import configuration, environment


class Section(NamedTuple):
    """A part of the page.

    Attributes:
        name: Of its template and its anchor.
        heading: What is above it.
        content: What the template shows; empty or None leaves the section out.
    """

    name: str
    heading: str
    content: Any


class Card(NamedTuple):
    """What of a run is seen first.

    Attributes:
        name: The run's.
        what: Method and backbone.
        headline: The score, and what it is; None without evaluation.
        facts: The bare facts, by name.
    """

    name: str
    what: str
    headline: dict[str, str] | None
    facts: dict[str, str]


def render(runs: Sequence[Run]) -> str:
    """The page.

    Args:
        runs: At least one; several are shown side by side.
    """
    sections = [
        Section("scores", "Evaluation", evaluation(runs)),
        Section("curves", "Curves", curves(runs)),
        Section("pictures", "Pictures", pictures(runs)),
        Section("config", "Configuration", configuration(runs)),
        Section("environment", "Environment and command", environment(runs)),
    ]
    return TEMPLATES.get_template("page.html.j2").render(
        runs=runs,
        title=" and ".join(dict.fromkeys(run.method for run in runs)) + ": " + ", ".join(run.name for run in runs),
        heading=_heading(runs),
        cards=[_card(run) for run in runs],
        sections=[section for section in sections if section.content],
        version=ssl_distill.__version__,
        day=_day(datetime.now(timezone.utc).isoformat()),
    )


def _heading(runs: Sequence[Run]) -> str:
    methods = " and ".join(dict.fromkeys(run.method for run in runs))
    return f"{methods}, {len(runs)} runs" if len(runs) > 1 else f"{methods} on {_data_of(runs[0])}"


def _day(moment: str) -> str:
    date = datetime.fromisoformat(moment)
    return f"{date.day} {date:%B %Y}"


def _data_of(run: Run) -> str:
    return str(run.config.get("data", {}).get("class_path", "?")).rpartition(".")[2].removesuffix("Data")


def _card(run: Run) -> Card:
    facts = {"data": _data_of(run), "steps": f"{run.num_steps:,}", "seed": str(run.config.get("seed_everything"))}
    if run.seconds is not None:
        facts["time"] = duration(run.seconds)
    elif run.starts:
        facts["time"] = "was stopped, or is still running"
    if run.starts:
        facts["started"] = f"{_day(run.starts[0]['started'])}, {run.starts[0]['started'][11:16]} UTC"
    return Card(run.name, " · ".join(filter(None, (run.method, run.backbone))), _headline(run), facts)


def _headline(run: Run) -> dict[str, str] | None:
    """The first score of the first evaluator: of the best encoder if it needs labels, else of the first."""
    scores = run.scores()
    if not scores:
        return None
    first = next(iter(next(iter(scores.values()))))
    having = {encoder: of_encoder[first] for encoder, of_encoder in scores.items() if first in of_encoder}
    best = next(iter(having)) if is_quality(first) else max(having, key=lambda encoder: having[encoder][1])
    before, now = having[best]
    change = "" if before is None else f", before training {number(first, before)}"
    return {"score": number(first, now), "text": f"{name_of(first)[0]} of the {best}{change}"}
