"""Scores as text."""

from collections.abc import Mapping
from typing import Any

Scores = dict[str, dict[str, float]]
"""Encoder to score to value."""


def score_table(title: str, scores: Scores, baseline: Scores, protocol: Mapping[str, Any]) -> str:
    """One row per score, three columns per encoder: now, baseline, change; below, how the numbers were made.

    Args:
        title: First line.
        scores: What to show.
        baseline: The same before training; empty shows a dash.
        protocol: Names to numbers, strings, lists or further such mappings.
    """
    names = list(dict.fromkeys(name for of_encoder in scores.values() for name in of_encoder))
    width = max(len(name) for name in names)
    cell, block = 12, 36
    lines = [title, " " * width + "".join(f"{encoder:>{block}}" for encoder in scores)]
    lines.append(" " * width + "".join(f"{head:>{cell}}" for _ in scores for head in ("now", "baseline", "change")))
    for name in names:
        row = f"{name:<{width}}"
        for encoder, of_encoder in scores.items():
            now, before = of_encoder.get(name), baseline.get(encoder, {}).get(name)
            change = None if now is None or before is None else now - before
            row += f"{show(name, now):>{cell}}{show(name, before):>{cell}}{show(name, change, '+'):>{cell}}"
        lines.append(row)
    return "\n".join([*lines, *protocol_lines(protocol)])


def show(name: str, value: float | None, sign: str = "") -> str:
    """A score as text: accuracies in percent, others with four digits; a dash for none. `sign` "+" is for changes."""
    if value is None:
        return "-"
    if name.startswith(("knn", "linear", "low_shot")):
        return f"{100 * value:{sign}.1f}" + " %" * (not sign)
    return f"{value:{sign}.4g}"


def protocol_lines(protocol: Mapping[str, Any]) -> list[str]:
    """Plain entries on one line, every nested mapping on a line of its own."""
    plain = {name: value for name, value in protocol.items() if not isinstance(value, Mapping)}
    nested = {name: value for name, value in protocol.items() if isinstance(value, Mapping)}
    return [_one_line(plain), *(f"{name}: {_one_line(value)}" for name, value in nested.items())]


def _one_line(entries: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {' '.join(f'{v:g}' for v in value) if isinstance(value, list) else value}"
        for name, value in entries.items()
    )
