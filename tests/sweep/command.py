"""`wrapq sweep` in a process of its own, and what it leaves."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

AXES = (
    "recipe=w4a16_rtn,w4a16_gptq",
    "rules.linear.weight.group_size=32,64,128",
    "rules.linear.weight.observer=minmax,mse",
)
"""Twelve jobs."""
TINY = (
    "evaluation.tokens=512",
    "evaluation.seq_len=64",
    "calibration.samples=4",
    "calibration.seq_len=64",
    "runtime.threads=1",
    "runtime.kernels=reference",
)
"""Overrides that make a job take a second. One thread, so that every launcher computes the same bits."""
VARIES = ("seconds", "folder", "run_id", "pareto", "status")
"""The columns that differ between two sweeps of the same jobs."""


def command(outputs: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "wrapq", "sweep", *overrides, *TINY, f"paths.outputs={outputs}"]


def sweep(outputs: Path, *overrides: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command(outputs, *overrides), capture_output=True, text=True, timeout=3000, check=False)
    assert result.returncode == status, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


def record(outputs: Path) -> dict[str, Any]:
    """The record of the only sweep."""
    (path,) = outputs.glob("sweep/*/sweep.json")
    return json.loads(path.read_text())


def table(outputs: Path) -> list[dict[str, str]]:
    """The table of the only sweep without the columns that may differ."""
    (path,) = outputs.glob("sweep/*/table.csv")
    with path.open() as file:
        return [{key: value for key, value in row.items() if key not in VARIES} for row in csv.DictReader(file)]


def finished_runs(outputs: Path) -> list[Path]:
    """The folders of all runs that finished."""
    runs = outputs.glob("*/*/run.json")
    return [path.parent for path in runs if json.loads(path.read_text())["status"] == "FINISHED"]


def kill_after(outputs: Path, jobs: int, *overrides: str, block: int = 0, seconds: float = 1500) -> None:
    """Start a sweep and kill it once `jobs` of its runs finished and another one is under way, behind its `block`."""
    process = subprocess.Popen(
        command(outputs, *overrides), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        begun = len(list(outputs.glob("sweep/*/jobs/*.json"))) > jobs
        begun &= not block or any(outputs.glob(f"*/*/resume/points-{block}.safetensors"))
        if begun and len(finished_runs(outputs)) >= jobs:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL
