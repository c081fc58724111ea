"""Finished runs side by side: which of their figures may be compared, and which is the best."""

from __future__ import annotations

from collections.abc import Sequence

from wrapq.metrics import Metric, metric, metrics_of
from wrapq.runs.run_record import RunRecord


def comparable(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """The figures by which the runs can be ranked: quality only where model and evaluation data are the same."""
    measured = {(r.lock.digests.get("model"), r.lock.digests.get("evaluation")) for r in records}
    return tuple(row.name for row in figures_of(records) if len(measured) == 1 or row.cost)


def figures_of(records: Sequence[RunRecord]) -> tuple[Metric, ...]:
    """The figures that any of the runs has."""
    return metrics_of([record.figures for record in records])


def best(records: Sequence[RunRecord], name: str) -> float | None:
    """The best value of a figure; None where fewer than two runs have it or all are equal."""
    values = [record.figures[name] for record in records if name in record.figures]
    if len(set(values)) < 2 or name not in comparable(records):
        return None
    return metric(name).best(values)
