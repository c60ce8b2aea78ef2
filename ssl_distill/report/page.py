"""One HTML page about one or several runs, with all it needs inside."""

from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path

import ssl_distill
from ssl_distill.report.curves import curves
from ssl_distill.report.markup import COLORS
from ssl_distill.report.names import duration, is_quality, name_of, number
from ssl_distill.report.pictures import pictures
from ssl_distill.report.runs import Run
from ssl_distill.report.scores import evaluation
from ssl_distill.report.settings import configuration, environment


def render(runs: Sequence[Run]) -> str:
    """The page.

    Args:
        runs: At least one; several are shown side by side.
    """
    here = Path(__file__).parent
    sections = [
        ("scores", "Evaluation", evaluation(runs)),
        ("curves", "Curves", curves(runs)),
        ("pictures", "Pictures", pictures(runs)),
        ("config", "Configuration", configuration(runs)),
        ("environment", "Environment and command", environment(runs)),
    ]
    sections = [section for section in sections if section[2]]
    title = " and ".join(dict.fromkeys(run.method for run in runs)) + ": " + ", ".join(run.name for run in runs)
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in sections)
    body = "".join(f'<h2 id="{anchor}">{heading}</h2>{content}' for anchor, heading, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{(here / 'page.css').read_text(encoding='utf-8')}</style></head><body>"
        f"<header><h1>{escape(_heading(runs))}</h1><nav>{links}</nav></header>{_cards(runs)}{body}"
        f"<footer>Made by ssl-distill {ssl_distill.__version__} on"
        f" {_day(datetime.now(timezone.utc).isoformat())}.</footer>"
        f'<div id="values"></div><script>{(here / "page.js").read_text(encoding="utf-8")}</script></body></html>'
    )


def _heading(runs: Sequence[Run]) -> str:
    methods = " and ".join(dict.fromkeys(run.method for run in runs))
    return f"{methods}, {len(runs)} runs" if len(runs) > 1 else f"{methods} on {_data_of(runs[0])}"


def _day(moment: str) -> str:
    date = datetime.fromisoformat(moment)
    return f"{date.day} {date:%B %Y}"


def _data_of(run: Run) -> str:
    return str(run.config.get("data", {}).get("class_path", "?")).rpartition(".")[2].removesuffix("Data")


def _cards(runs: Sequence[Run]) -> str:
    """A card per run: its headline score and the bare facts."""
    cards = []
    for i, run in enumerate(runs):
        facts = {"data": _data_of(run), "steps": f"{run.num_steps:,}", "seed": str(run.config.get("seed_everything"))}
        if run.seconds is not None:
            facts["time"] = duration(run.seconds)
        elif run.starts:
            facts["time"] = "was stopped, or is still running"
        if run.starts:
            facts["started"] = f"{_day(run.starts[0]['started'])}, {run.starts[0]['started'][11:16]} UTC"
        rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
        cards.append(
            f'<section class="card c{i % COLORS}"><div><div class="name">{escape(run.name)}</div>'
            f'<div class="what">{escape(" · ".join(filter(None, (run.method, run.backbone))))}</div>'
            f"{_headline(run)}</div><dl>{rows}</dl></section>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _headline(run: Run) -> str:
    """The first score of the first evaluator: of the best encoder if it needs labels, else of the first."""
    scores = run.scores()
    if not scores:
        return '<p class="note">Not evaluated.</p>'
    first = next(iter(next(iter(scores.values()))))
    having = {encoder: of_encoder[first] for encoder, of_encoder in scores.items() if first in of_encoder}
    best = next(iter(having)) if is_quality(first) else max(having, key=lambda encoder: having[encoder][1])
    before, now = having[best]
    change = "" if before is None else f", before training {number(first, before)}"
    return (
        f'<div class="score">{number(first, now)}</div>'
        f'<div class="what">{escape(name_of(first)[0])} of the {escape(best)}{change}</div>'
    )
