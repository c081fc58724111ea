"""The page of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wrapq.html.charts import Chart, scatter
from wrapq.html.parts import Column, Row, Table, render, short
from wrapq.metrics import KL, Metric, metrics, metrics_of, pareto


def render_sweep(records: Sequence[Mapping[str, Any]], path: Path, title: str = "Sweep", summary: str = "") -> Path:
    """Write the page of a sweep: its jobs in a table, quality against size, bits and time, and the winner.

    Each record is a job: `name` and what is known of `status` (FINISHED, FAILED), `reason`, `parameters` (those that
    vary, by name), `figures` (by the names of `wrapq.metrics`), `goals` (`met` or `missed`) and `winner`. The `summary`
    stands below the title. Returns the path.
    """
    names = dict.fromkeys(key for record in records for key in record.get("parameters", {}))
    winner = next((record for record in records if record.get("winner")), None)
    known = metrics_of([record.get("figures", {}) for record in records])
    charts = [chart for cost in known if cost.cost and (chart := _plot(records, cost)) is not None]
    failed = [(str(r["name"]), str(r.get("reason", ""))) for r in records if r.get("status") == "FAILED"]
    parts = (("plots", "Quality against cost", charts), ("jobs", "Jobs", True), ("failures", "Failures", failed))
    tiles = []
    if winner is not None:
        figures = winner.get("figures", {})
        tiles = [(m.label, m.text(figures[m.name])) for m in known if _known(figures, m)]
        tiles = [("Winner", str(winner["name"])), *tiles]
    values = {
        "title": title,
        "summary": summary or f"{len(records)} jobs, {len(failed)} failed.",
        "sections": [(id, name) for id, name, there in parts if there],
        "charts": charts,
        "winner": winner,
        "tiles": tiles,
        "jobs": _jobs(records, list(names)),
        "failed": failed,
    }
    path.write_text(render("sweep.html.j2", values), encoding="utf-8")
    return path


def _plot(records: Sequence[Mapping[str, Any]], cost: Metric) -> Chart | None:
    measured = [record for record in records if _known(record.get("figures", {}), cost)]
    able = [metric for metric in metrics() if not metric.cost and not metric.higher]
    able.sort(key=lambda metric: metric.name != KL)
    quality = next((metric for metric in able if all(_known(r["figures"], metric) for r in measured)), None)
    if quality is None or len(measured) < 2:
        return None
    places = [(float(r["figures"][cost.name]), float(r["figures"][quality.name])) for r in measured]
    points = [
        (*place, str(r["name"]), "winner" if r.get("winner") else "best" if best else "")
        for place, best, r in zip(places, pareto(places), measured, strict=True)
    ]
    return scatter(f"{quality.axis} against {cost.axis}", cost.axis, quality.axis, points, (short, short))


def _jobs(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    shown = metrics_of([record.get("figures", {}) for record in records])
    figures = [metric for metric in shown if any(_known(record.get("figures", {}), metric) for record in records)]
    goals = any(record.get("goals") for record in records)
    columns = [Column("job"), *(Column(name, code=True) for name in names)]
    columns += [Column(metric.label, number=True) for metric in figures]
    columns += [Column("goals"), Column("")] if goals else [Column("")]
    rows = []
    for record in records:
        own = record.get("figures", {})
        cells = [str(record["name"]), *(str(record.get("parameters", {}).get(name, "")) for name in names)]
        cells += [metric.text(own[metric.name]) if _known(own, metric) else "" for metric in figures]
        cells += [str(record.get("goals", ""))] if goals else []
        mark = "winner" if record.get("winner") else "failed" if record.get("status") == "FAILED" else ""
        rows.append(Row((*cells, mark), kind=mark))
    return Table("All jobs", columns, rows)


def _known(figures: Mapping[str, Any], metric: Metric) -> bool:
    value = figures.get(metric.name)
    return isinstance(value, int | float) and math.isfinite(value)
