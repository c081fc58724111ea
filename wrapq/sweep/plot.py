"""The Pareto plot: quality against size and against time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wrapq.metrics import metric
from wrapq.sweep.table import SweepTable

_POINT, _FRONT, _WINNER, _GOAL = "#8a94a6", "#2563eb", "#d97706", "#64748b"


def save_plot(table: SweepTable, path: Path) -> None:
    """Draw every finished job, numbered, with the fronts, the goals and the winner."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    costs = table.costs
    figure = Figure(figsize=(5 * len(costs), 4.4), layout="constrained")  # without pyplot, which keeps global state
    FigureCanvasAgg(figure)
    for axes, against in zip(figure.subplots(1, len(costs), sharey=True), costs, strict=True):
        _draw(axes, table, against)
        axes.set_xlabel(metric(against).axis)
    figure.axes[0].set_ylabel(metric(table.quality).axis)
    figure.savefig(path, format="png", dpi=130)


def _draw(axes: Any, table: SweepTable, against: str) -> None:
    rows = [row for row in table.rows if row.done]
    place = lambda row: (row.outcome.figures[against], row.outcome.figures[table.quality])  # noqa: E731
    if not rows:
        axes.text(0.5, 0.5, "no job finished", ha="center", transform=axes.transAxes)
        return
    axes.scatter(*zip(*map(place, rows), strict=True), color=_POINT, zorder=2)
    front = [place(row) for row in table.front(against)]
    axes.step(*zip(*front, strict=True), where="post", color=_FRONT, marker="o", label="Pareto front", zorder=3)
    for row in rows:
        axes.annotate(str(row.number), place(row), xytext=(5, 5), textcoords="offset points", fontsize=8)
    if table.winner is not None:
        axes.scatter(*place(table.winner), marker="*", s=190, color=_WINNER, label="winner", zorder=4)
    verdicts = [item for row in table.rows for item in row.outcome.goals.items()]
    for name, bound in sorted({(name, v.bound) for name, v in verdicts if not v.survival}):
        if name == against:
            axes.axvline(bound, color=_GOAL, linestyle="--", linewidth=1)
        elif name == table.quality:
            axes.axhline(bound, color=_GOAL, linestyle="--", linewidth=1)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right", fontsize=8, framealpha=0.8)
