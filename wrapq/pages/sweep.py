"""The page of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wrapq.pages.charts import Chart, pareto, scatter
from wrapq.pages.parts import Column, Row, Table, duration, percent, render, short

_FIGURES = {
    "perplexity": ("perplexity", "{:.3f}".format),
    "perplexity_increase": ("change", lambda v: percent(v, sign=True)),
    "kl": ("KL to float", "{:.5f}".format),
    "top1_agreement": ("top-1 agreement", percent),
    "bits_per_weight": ("bits per weight", "{:.2f}".format),
    "size_mb": ("size", "{:.1f} MB".format),
    "seconds": ("time", duration),
}
_QUALITY = ("kl", "perplexity_increase", "perplexity")
_COSTS = {"size_mb": "size in MB", "bits_per_weight": "bits per weight", "seconds": "time in seconds"}


def render_sweep(records: Sequence[Mapping[str, Any]], path: Path, title: str = "Sweep", summary: str = "") -> Path:
    """Write the page of a sweep: its jobs in a table, quality against size, bits and time, and the winner.

    Args:
        records: for each job a mapping with `name` and what is known of: `status` (FINISHED, FAILED), `reason`,
            `parameters` (those that vary, by name), `figures` (perplexity, perplexity_increase as a share, kl,
            top1_agreement, bits_per_weight, size_mb, seconds), `goals` (`met` or `missed`), `winner`.
        path: the file to write.
        title: the heading.
        summary: a sentence below it.

    Returns:
        The path.
    """
    names = dict.fromkeys(key for record in records for key in record.get("parameters", {}))
    winner = next((record for record in records if record.get("winner")), None)
    charts = [chart for cost in _COSTS if (chart := _plot(records, cost)) is not None]
    failed = [(str(r["name"]), str(r.get("reason", ""))) for r in records if r.get("status") == "FAILED"]
    sections = [("jobs", "Jobs")]
    sections = ([("plots", "Quality against cost")] if charts else []) + sections
    sections += [("failures", "Failures")] if failed else []
    values = {
        "title": title,
        "summary": summary or f"{len(records)} jobs, {len(failed)} failed.",
        "sections": sections,
        "charts": charts,
        "winner": winner,
        "tiles": [] if winner is None else [("Winner", str(winner["name"]), ""), *_tiles(winner)],
        "jobs": _jobs(records, list(names)),
        "failed": failed,
    }
    path.write_text(render("sweep.html.j2", values), encoding="utf-8")
    return path


def _tiles(winner: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    figures = winner.get("figures", {})
    return [(label, show(figures[name]), "") for name, (label, show) in _FIGURES.items() if _known(figures, name)]


def _plot(records: Sequence[Mapping[str, Any]], cost: str) -> Chart | None:
    measured = [record for record in records if _known(record.get("figures", {}), cost)]
    quality = next((q for q in _QUALITY if all(_known(r["figures"], q) for r in measured)), None)
    if quality is None or len(measured) < 2:
        return None
    places = [(float(r["figures"][cost]), float(r["figures"][quality])) for r in measured]
    kinds = [
        "winner" if r.get("winner") else "best" if best else ""
        for r, best in zip(measured, pareto(places), strict=True)
    ]
    points = [(x, y, str(r["name"]), kind, "") for (x, y), kind, r in zip(places, kinds, measured, strict=True)]
    label, show = _FIGURES[quality]
    return scatter(
        f"{label} against {_COSTS[cost]}",
        _COSTS[cost],
        label,
        points,
        (short, show if quality == "perplexity_increase" else short),
    )


def _jobs(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    figures = [name for name in _FIGURES if any(_known(record.get("figures", {}), name) for record in records)]
    goals = any(record.get("goals") for record in records)
    columns = [Column("job"), *(Column(name, code=True) for name in names)]
    columns += [Column(_FIGURES[name][0], number=True) for name in figures]
    columns += [Column("goals")] if goals else []
    columns += [Column("")]
    rows = []
    for record in records:
        own = record.get("figures", {})
        cells = [str(record["name"]), *(str(record.get("parameters", {}).get(name, "")) for name in names)]
        cells += [_FIGURES[name][1](own[name]) if _known(own, name) else "" for name in figures]
        cells += [str(record.get("goals", ""))] if goals else []
        mark = "winner" if record.get("winner") else "failed" if record.get("status") == "FAILED" else ""
        rows.append(Row((*cells, mark), kind=mark))
    return Table("All jobs", tuple(columns), tuple(rows))


def _known(figures: Mapping[str, Any], name: str) -> bool:
    value = figures.get(name)
    return isinstance(value, int | float) and math.isfinite(value)
