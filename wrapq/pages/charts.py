"""Small SVG charts that take their colours from the page, so that they are light or dark with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 40
MARKED = 24  # points of a line up to which each is drawn as a dot


@dataclass(frozen=True)
class Mark:
    """A point or a bar, at a place in the picture, with what it says when it is pointed at."""

    x: float
    y: float
    title: str
    label: str = ""
    kind: str = ""
    width: float = 0.0
    href: str = ""


@dataclass(frozen=True)
class Line:
    """A line through marks, with its name and its number among the colours."""

    name: str
    marks: tuple[Mark, ...]
    color: int = 0

    @property
    def path(self) -> str:
        """The SVG path."""
        return " ".join(f"{'ML'[i > 0]}{mark.x:.1f} {mark.y:.1f}" for i, mark in enumerate(self.marks))

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
    x_ticks: tuple[tuple[float, str], ...] = ()
    y_ticks: tuple[tuple[float, str], ...] = ()
    lines: tuple[Line, ...] = ()
    points: tuple[Mark, ...] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM
    front: str = field(default="")


def line_chart(
    title: str, x_label: str, y_label: str, curves: Mapping[str, Sequence[float]], show: Callable[[float], str]
) -> Chart | None:
    """Curves over an index, such as the block; None when there is nothing to draw.

    Args:
        title: what the picture shows, in a sentence.
        x_label: what the index counts.
        y_label: what the values are.
        curves: values by the name of their curve.
        show: a value as people read it.
    """
    curves = {name: list(curve) for name, curve in curves.items() if len(curve) > 1}
    finite = [v for curve in curves.values() for v in curve if math.isfinite(v)]
    if not finite:
        return None
    last = max(len(curve) for curve in curves.values()) - 1
    low, high, step = nice_range(min(finite), max(finite))
    x, y = _scale(0, last, LEFT, WIDTH - RIGHT), _scale(low, high, HEIGHT - BOTTOM, TOP)
    lines = []
    for color, (name, curve) in enumerate(curves.items()):
        marks = tuple(
            Mark(x(i), y(v), f"{name}, {x_label} {i}: {show(v)}") for i, v in enumerate(curve) if math.isfinite(v)
        )
        lines.append(Line(name, marks, color))
    every = max(1, math.ceil((last + 1) / 12))
    x_ticks = tuple((x(i), str(i)) for i in range(0, last + 1, every))
    said = "; ".join(f"{name} from {show(min(curve))} to {show(max(curve))}" for name, curve in curves.items())
    return Chart(title, f"{title}: {said}.", x_label, y_label, x_ticks, _ticks(low, high, step, y, show), tuple(lines))


def scatter(
    title: str,
    x_label: str,
    y_label: str,
    points: Sequence[tuple[float, float, str, str, str]],
    show: tuple[Callable[[float], str], Callable[[float], str]],
) -> Chart | None:
    """Points (x, y, name, kind, address), lower and further left being better, with the line through the best.

    `kind` is a class of the page's style: `best` where no other point is as good in both, `winner`, or empty.
    """
    points = [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]
    if not points:
        return None
    x_low, x_high, x_step = nice_range(min(p[0] for p in points), max(p[0] for p in points))
    y_low, y_high, y_step = nice_range(min(p[1] for p in points), max(p[1] for p in points))
    x, y = _scale(x_low, x_high, LEFT, WIDTH - RIGHT), _scale(y_low, y_high, HEIGHT - BOTTOM, TOP)
    marks = tuple(
        Mark(x(px), y(py), f"{name}: {x_label} {show[0](px)}, {y_label} {show[1](py)}", name, kind, href=href)
        for px, py, name, kind, href in points
    )
    best = sorted((mark.x, mark.y) for mark in marks if mark.kind)
    front = " ".join(f"{'ML'[i > 0]}{px:.1f} {py:.1f}" for i, (px, py) in enumerate(best))
    said = "; ".join(mark.title for mark in marks)
    return Chart(
        title,
        f"{title}. {said}.",
        x_label,
        y_label,
        _ticks(x_low, x_high, x_step, x, show[0]),
        _ticks(y_low, y_high, y_step, y, show[1]),
        points=marks,
        front=front if len(best) > 1 else "",
    )


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point is at least as good in both coordinates and better in one; less is better."""
    return [
        math.isfinite(x)
        and math.isfinite(y)
        and not any(ox <= x and oy <= y and (ox < x or oy < y) for ox, oy in points)
        for x, y in points
    ]


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


def _ticks(
    low: float, high: float, step: float, place: Callable[[float], float], show: Callable[[float], str]
) -> tuple[tuple[float, str], ...]:
    values = [low + i * step for i in range(round((high - low) / step) + 1)]
    return tuple((place(value), show(value)) for value in values)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)
