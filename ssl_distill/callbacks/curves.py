"""How a run went, as a picture."""

import math
from collections.abc import Iterable
from pathlib import Path

from ssl_distill.callbacks.atomic import replacing
from ssl_distill.callbacks.metrics_table import read_metrics

_ORDER = ("train/loss", "train/", "schedule/", "train/health/", "val/", "")  # panels; "" is everything else
_COLUMNS = 4

Curves = dict[str, list[tuple[float, float]]]


def draw_curves(metrics: str | Path, path: str | Path) -> None:
    """Save one panel per quantity of a `metrics.csv` over optimiser steps; encoders share a panel.

    Args:
        metrics: The table.
        path: Image file to write; an empty table makes none.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    panels = curve_panels(read_metrics(metrics))
    if not panels:
        return
    rows = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(3.6 * _COLUMNS, 2.4 * rows), layout="constrained")
    for i, (title, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, _COLUMNS, i + 1)
        for label, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 20 else "", linewidth=1)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("optimiser step", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if any(curves):
            axes.legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def curve_panels(rows: Iterable[dict[str, float]]) -> dict[str, Curves]:
    """Finite points (step, value) by panel and curve, panels in reading order."""
    panels: dict[str, Curves] = {}
    for row in rows:
        for key, value in row.items():
            if key in ("step", "epoch") or not math.isfinite(value):
                continue
            parts = key.split("/")
            title, label = (f"val/{parts[2]}", parts[1]) if parts[0] == "val" and len(parts) == 3 else (key, "")
            panels.setdefault(title, {}).setdefault(label, []).append((row["step"], value))
    return {title: panels[title] for title in sorted(panels, key=lambda title: (_place(title), title))}


def _place(title: str) -> int:
    """Position of the longest prefix that fits."""
    return _ORDER.index(max((prefix for prefix in _ORDER if title.startswith(prefix)), key=len))
