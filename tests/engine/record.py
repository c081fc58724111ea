"""Small runs, and what they left in MLflow and in their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

SMALL = ("evaluation.tokens=512", "calibration.samples=4")
"""Overrides that make a calibrated run take a second."""


def recorded(database: Path) -> Run:
    """The only run in an MLflow database."""
    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return run


def status(folder: Path) -> dict[str, Any]:
    """What a run's folder says of how it ended."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def only_run(outputs: Path) -> Path:
    """The folder of the only run under `outputs`."""
    (found,) = outputs.glob("*/*/run.json")
    return found.parent


def partial_files(outputs: Path) -> list[Path]:
    """Everything that was left half written."""
    return [path for path in outputs.rglob("*") if "partial" in path.name or "probe" in path.name]
