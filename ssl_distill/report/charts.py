"""Where curves and axes lie in a chart."""

import math
from collections.abc import Iterator, Sequence
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


class Chart(NamedTuple):
    """A panel with axes, in the pixels that it is drawn in; the page's script shows values under the pointer.

    Attributes:
        title: What it shows.
        percent: Whether values are fractions that are told in percent.
        size: Width and height.
        frame: Left, upper, right and lower edge of what the axes span.
        last_step: The step at the right edge.
        low: The value at the lower edge.
        high: The value at the upper edge.
        values: Height and label of every grid line.
        steps: Place and label of every mark below.
        curves: Their points in pixels; some are left out of long ones.
    """

    title: str
    percent: bool
    size: tuple[int, int]
    frame: tuple[int, int, int, int]
    last_step: float
    low: float
    high: float
    values: list[tuple[float, str]]
    steps: list[tuple[float, str]]
    curves: list[Curve]


def chart(title: str, curves: Sequence[Curve], percent: bool = False) -> Chart:
    """Place curves in a panel.

    Args:
        title: What it shows.
        curves: At least one.
        percent: Whether values are fractions that are told in percent.
    """
    xs, ys = zip(*(point for curve in curves for point in curve.points), strict=True)
    low, high = _widened(min(ys), max(ys))
    last_step = max(*xs, 1)
    left, top, right, bottom = _LEFT, _TOP, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / last_step * (right - left), top + (high - y) / (high - low) * (bottom - top)

    return Chart(
        title,
        percent,
        (_WIDTH, _HEIGHT),
        (left, top, right, bottom),
        last_step,
        low,
        high,
        [(place(0, y)[1], f"{100 * y:g} %" if percent else f"{y:.4g}") for y in _ticks(low, high)],
        [(place(x, low)[0], _short(x)) for x in _ticks(0, last_step)],
        [curve._replace(points=[place(x, y) for x, y in _thinned(curve.points)]) for curve in curves],
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
