"""Small SVG charts that take their colours from the page, so that they are light or dark with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 40
MARKED = 24  # points of a line up to which each is drawn as a dot


@dataclass(frozen=True)
class Dot:
    """A point or a bar, at a place in the picture, with what it says when it is pointed at."""

    x: float
    y: float
    title: str
    label: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Line:
    """A line through marks, with its name and its number among the colours."""

    name: str
    marks: Sequence[Dot]
    color: int = 0

    @property
    def path(self) -> str:
        """The SVG path."""
        return _path((mark.x, mark.y) for mark in self.marks)

    @property
    def dotted(self) -> bool:
        """Whether there is room for a dot at each point."""
        return len(self.marks) <= MARKED


@dataclass(frozen=True)
class Chart:
    """A picture: its axes with their ticks (place, text), and what stands between them."""

    title: str
    description: str
    x_label: str
    y_label: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    lines: Sequence[Line] = ()
    points: Sequence[Dot] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM
    front: str = ""


def line_chart(
    title: str, x_label: str, y_label: str, curves: Mapping[str, Sequence[float]], show: Callable[[float], str]
) -> Chart | None:
    """Curves over an index, such as the block; None when there is nothing to draw. `show` writes a value."""
    curves = {name: list(curve) for name, curve in curves.items() if len(curve) > 1}
    finite = [v for curve in curves.values() for v in curve if math.isfinite(v)]
    if not finite:
        return None
    last = max(len(curve) for curve in curves.values()) - 1
    x = _scale(0, last, LEFT, WIDTH - RIGHT)
    y, y_ticks = _axis(finite, HEIGHT - BOTTOM, TOP, show)
    lines = []
    for color, (name, curve) in enumerate(curves.items()):
        values = [(i, value) for i, value in enumerate(curve) if math.isfinite(value)]
        lines.append(Line(name, [Dot(x(i), y(v), f"{name}, {x_label} {i}: {show(v)}") for i, v in values], color))
    x_ticks = [(x(i), str(i)) for i in range(0, last + 1, max(1, math.ceil((last + 1) / 12)))]
    spans = "; ".join(f"{name} from {show(min(curve))} to {show(max(curve))}" for name, curve in curves.items())
    return Chart(title, f"{title}: {spans}.", x_label, y_label, x_ticks, y_ticks, lines)


def scatter(
    title: str,
    x_label: str,
    y_label: str,
    points: Sequence[tuple[float, float, str, str]],
    show: tuple[Callable[[float], str], Callable[[float], str]],
) -> Chart | None:
    """Points (x, y, name, kind), lower and further left being better, with the line through the best.

    `kind` is a class of the page's style: `best` where no other point is as good in both, `winner`, or empty.
    """
    points = [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]
    if not points:
        return None
    x, x_ticks = _axis([p[0] for p in points], LEFT, WIDTH - RIGHT, show[0])
    y, y_ticks = _axis([p[1] for p in points], HEIGHT - BOTTOM, TOP, show[1])
    marks = [
        Dot(x(px), y(py), f"{name}: {x_label} {show[0](px)}, {y_label} {show[1](py)}", name, kind)
        for px, py, name, kind in points
    ]
    best = sorted((mark.x, mark.y) for mark in marks if mark.kind)
    front = _path(best) if len(best) > 1 else ""
    listing = "; ".join(mark.title for mark in marks)
    return Chart(title, f"{title}. {listing}.", x_label, y_label, x_ticks, y_ticks, points=marks, front=front)


def nice_range(low: float, high: float, parts: int = 4) -> tuple[float, float, float]:
    """Round limits around `low` and `high`, and a round step that divides them into about `parts`.

    From zero, where `low` is nearer to it than the values are to each other.
    """
    if 0 < low < high - low or low == high > 0:
        low = 0.0
    if low == high:
        low, high = low - 1, high + 1
    rough = (high - low) / parts
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    return step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9), step


def _axis(
    values: Sequence[float], start: float, end: float, show: Callable[[float], str]
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Where a value lies on an axis from `start` to `end` that holds all `values`, and its ticks."""
    low, high, step = nice_range(min(values), max(values))
    place = _scale(low, high, start, end)
    ticks = [low + i * step for i in range(round((high - low) / step) + 1)]
    return place, [(place(value), show(value)) for value in ticks]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / ((high - low) or 1.0) * (end - start)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{'ML'[i > 0]}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
