"""What recording a run in MLflow costs it."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest

import wrapq

OPTIONS = ("calibration.samples=64", "evaluation.tokens=32768", "runtime.device=cpu")


def seconds(outputs: Path, tracking: str) -> float:
    start = time.perf_counter()
    wrapq.run("demo", [*OPTIONS, f"tracking={tracking}", f"paths.outputs={outputs}"])
    return time.perf_counter() - start


@pytest.mark.bench
@pytest.mark.timeout(1200)
def test_tracking_costs_under_five_percent(tmp_path: Path) -> None:
    """Runs with and without, in turn; the first of each, which imports and makes tables, does not count."""
    taken: dict[str, list[float]] = {"mlflow": [], "none": []}
    for _ in range(4):
        for tracking, times in taken.items():
            times.append(seconds(tmp_path, tracking))
    with_it, without = (statistics.median(times[1:]) for times in taken.values())
    print(f"\nwith MLflow {with_it:.2f} s, without {without:.2f} s: {100 * (with_it / without - 1):+.1f} %")
    assert with_it < 1.05 * without
