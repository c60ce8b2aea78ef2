"""Small pieces of HTML."""

from collections.abc import Sequence
from html import escape
from typing import Any

from ssl_distill.report.runs import Run

COLORS = 6  # of runs; then they repeat


def table(head: str, rows: Sequence[str]) -> str:
    """A table that scrolls sideways on its own; `head` and `rows` are HTML."""
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def run_label(run: Run, position: int) -> str:
    """A run's colour and name."""
    return f'<span class="chip c{position % COLORS}"></span>{escape(run.name)}'


def run_heading(runs: Sequence[Run], position: int) -> str:
    """A heading for what belongs to one of several runs."""
    return f"<h3>{run_label(runs[position], position)}</h3>" if len(runs) > 1 else ""


def setting(value: Any) -> str:
    """The value of an argument as YAML writes it."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"<code>{escape(text)}</code>"
