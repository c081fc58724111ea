"""Finished runs side by side: which of their figures may be compared, and which is the best."""

from __future__ import annotations

from collections.abc import Sequence

from wrapq.metrics import METRICS, metrics
from wrapq.runs.run_record import RunRecord


def comparable(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """The figures by which runs can be ranked: quality only where model and evaluation data are the same."""
    measured = {(r.lock.digests.get("model"), r.lock.digests.get("evaluation")) for r in records}
    return tuple(metric.name for metric in metrics() if len(measured) == 1 or metric.cost)


def best(records: Sequence[RunRecord], name: str) -> float | None:
    """The best value of a figure; None where fewer than two runs have it or all are equal."""
    values = [record.figures[name] for record in records if name in record.figures]
    if len(set(values)) < 2 or name not in comparable(records):
        return None
    return METRICS.get(name).best(values)
