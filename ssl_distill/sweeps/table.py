"""What a search found: a table and a picture."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_distill.callbacks.atomic import replacing

Row = Mapping[str, Any]
"""`trial`, `state`, `value` and `seconds`, then whatever else is known of a trial, parameters by dotted key."""

_PAPER = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}  # lines do not strike numbers out


def write_table(rows: Sequence[Row], path: str | Path) -> None:
    """Save a CSV with one row per trial."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def draw_parallel(rows: Sequence[Row], axes: Mapping[str, bool], metric: str, path: str | Path) -> None:
    """Save parallel coordinates: an axis per parameter, the metric on the last, a line per trial.

    Trials that were ended early are grey dashes; a trial without any value is left out.

    Args:
        rows: Of `write_table`.
        axes: Parameters to show; whether on a logarithmic axis.
        metric: Name of the value.
        path: Image file to write; without trials there is none.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    rows = [row for row in rows if isinstance(row["value"], float) and math.isfinite(row["value"])]
    if not rows:
        return
    columns = [_Axis([row[name] for row in rows], is_log) for name, is_log in axes.items()]
    columns.append(_Axis([row["value"] for row in rows], is_log=False))
    figure = Figure(figsize=(max(2.1 * len(columns), 6), 4.6), layout="constrained")
    plot = figure.add_subplot()
    colors = matplotlib.colormaps["viridis"]
    for i, row in enumerate(rows):
        heights = [column.heights[i] for column in columns]
        done = row["state"] == "complete"
        style: dict[str, Any] = (
            {"color": colors(heights[-1]), "linewidth": 1.6} if done else {"color": "0.7", "ls": "--"}
        )
        plot.plot(heights, marker="o", markersize=3, **style)
        plot.annotate(str(row["trial"]), (len(columns) - 1, heights[-1]), (6, -3), textcoords="offset points", size=8)
    for x, column in enumerate(columns):
        plot.axvline(x, color="0.3", linewidth=0.8)
        for height, text in column.ticks:
            place: dict[str, Any] = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
            plot.annotate(text, (x, height), size=7, bbox=_PAPER, **place)
    plot.set_xticks(range(len(columns)), [*map(_short, axes), metric.replace("/", "/\n", 1)], fontsize=8)
    plot.set_yticks([])
    plot.set_xlim(-0.6, len(columns) - 0.7)
    plot.set_ylim(-0.05, 1.05)
    for side in ("left", "right", "top", "bottom"):
        plot.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)


class _Axis:
    """Places of values from 0 to 1, and what is written beside them."""

    def __init__(self, values: Sequence[Any], is_log: bool) -> None:
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if numeric:
            places = [math.log(value) if is_log else float(value) for value in values]
        else:
            names = sorted({str(value) for value in values})
            places = [float(names.index(str(value))) for value in values]
        low, high = min(places), max(places)
        self.heights = [0.5 if high == low else (place - low) / (high - low) for place in places]
        texts = [f"{value:.3g}" if numeric else str(value) for value in values]
        ticks = dict(zip(self.heights, texts, strict=True))
        if numeric and len(ticks) > 6:  # ends and middle say enough
            middle = (low + high) / 2
            ticks = {0.0: ticks[0.0], 0.5: f"{math.exp(middle) if is_log else middle:.3g}", 1.0: ticks[1.0]}
        self.ticks = sorted(ticks.items())


def _short(key: str) -> str:
    """The telling end of a dotted key, in two lines."""
    parts = [part for part in key.split(".") if part not in ("model", "data", "trainer", "init_args")]
    return "\n".join([".".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
