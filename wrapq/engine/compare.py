"""What finished runs left, read for putting side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wrapq.engine.finished import PLAN, find_run, read_plan, read_status
from wrapq.engine.goals import figures
from wrapq.engine.lock import LOCK, Lock, read_lock
from wrapq.errors import ModelError
from wrapq.resolve.plan import Plan

LOWER_IS_BETTER = {
    "perplexity": True,
    "perplexity_increase": True,
    "kl": True,
    "top1_agreement": False,
    "size_mb": True,
    "bits_per_weight": True,
    "seconds": True,
}
"""The figures of a run, and in which direction each is better."""
QUALITY = ("perplexity", "perplexity_increase", "kl", "top1_agreement")
"""The figures that depend on the text they were measured on."""


@dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
        name: as the user called it.
        folder: where it lies.
        figures: by the names of `LOWER_IS_BETTER`; what was not measured is left out.
        stages: for each stage all its metrics.
        seconds: for each step of the run how long it took.
        curves: for each curve its value at every block.
        weights: for each quantized weight its errors, by its full name.
    """

    name: str
    folder: Path
    plan: Plan
    lock: Lock
    figures: dict[str, float]
    stages: dict[str, dict[str, float]]
    seconds: dict[str, float]
    curves: dict[str, list[float]] = field(default_factory=dict)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)


def read_records(texts: Sequence[str], outputs: Path) -> list[Record]:
    """The runs that `texts` name (see `find_run`); raises `ModelError` when one is none or its files are damaged."""
    return [_read(text, find_run(text, outputs)) for text in texts]


def comparable(records: Sequence[Record]) -> tuple[str, ...]:
    """The figures by which one of the runs may be called the best: quality only where model and text are the same."""
    measured = {(r.lock.digests.get("model"), r.lock.digests.get("evaluation")) for r in records}
    return tuple(name for name in LOWER_IS_BETTER if len(measured) == 1 or name not in QUALITY)


def best(records: Sequence[Record], name: str) -> float | None:
    """The best value of a figure; None where fewer than two runs have it or all are equal."""
    values = [record.figures[name] for record in records if name in record.figures]
    if len(set(values)) < 2 or name not in comparable(records):
        return None
    return min(values) if LOWER_IS_BETTER[name] else max(values)


def _read(text: str, folder: Path) -> Record:
    status, plan = read_status(folder), read_plan(folder / PLAN)
    try:
        stages, sizes, seconds = status["stages"], status["sizes"], status["seconds"]
        reached = _figures(stages, sizes, seconds, plan)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"{folder} is not the folder of a finished run: {error!r} in run.json") from error
    weights = _read_json(folder / "modules.json")
    return Record(text, folder, plan, read_lock(folder / LOCK), reached, stages, seconds, _curves(status), weights)


def _figures(stages: dict[str, Any], sizes: dict[str, int], seconds: dict[str, float], plan: Plan) -> dict[str, float]:
    found = figures(stages, sizes, seconds, plan.estimate.bits_per_weight)
    return {name: found[name] for name in LOWER_IS_BETTER if name in found}


def _curves(status: dict[str, Any]) -> dict[str, list[float]]:
    return dict(status.get("curves") or {})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
