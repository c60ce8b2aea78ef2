"""Curves as SVG that follows the page's colours."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 10, 24  # margins for the labels of the axes
_MOST_POINTS = 400


class Curve(NamedTuple):
    """One line.

    Attributes:
        label: What it is.
        color: Number of its colour, 0 to 5.
        dash: Number of its dash pattern, 0 (solid) to 3.
        points: Step and value, finite, by step.
    """

    label: str
    color: int
    dash: int
    points: list[tuple[float, float]]


def chart(title: str, curves: Sequence[Curve], percent: bool = False) -> str:
    """A panel with axes and curves; the page's script shows values under the pointer."""
    xs, ys = zip(*(point for curve in curves for point in curve.points), strict=True)
    low, high = _widened(min(ys), max(ys))
    right = max(*xs, 1)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT),
            _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = []
    for value in _ticks(low, high):
        _, y = place(0, value)
        text = f"{100 * value:g} %" if percent else f"{value:.4g}"
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for value in _ticks(0, right):
        x, _ = place(value, low)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 5}" text-anchor="middle">{_short(value)}</text>')
    for curve in curves:
        points = [place(x, y) for x, y in _thinned(curve.points)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        kind = f'class="c{curve.color} d{curve.dash}" data-label="{escape(curve.label)}"'
        parts.append(f'<polyline {kind} points="{drawn}"/>')
        if len(points) <= 20:
            dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in points)
            parts.append(f'<g class="c{curve.color}">{dots}</g>')
    frame = f"{_LEFT} {_TOP} {_WIDTH - _RIGHT} {_HEIGHT - _BOTTOM}"
    axes = f'data-frame="{frame}" data-right="{right:g}" data-low="{low!r}" data-high="{high!r}"'
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" {axes}'
        f"{' data-percent' * percent}>{''.join(parts)}</svg></figure>"
    )


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range with some air; never empty."""
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> Iterator[float]:
    """Three to six round numbers within a range."""
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= 0.999 * rough)
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield round(i * step, 12)


def _short(step: float) -> str:
    return f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Least and largest value of every stretch of a long curve, so that peaks stay, and both ends."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    length = -(-len(points) // (_MOST_POINTS // 2))
    kept = {points[0], points[-1]}
    for start in range(0, len(points), length):
        stretch = points[start : start + length]
        kept |= {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
    return sorted(kept)
