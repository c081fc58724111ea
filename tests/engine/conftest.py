"""One finished run of the default recipe, recorded in MLflow, that several tests look at."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import wrapq
from tests.engine.record import SMALL
from wrapq.engine.run import RunResult

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz123456"


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="session")
def finished(outputs: Path) -> RunResult:
    """The run; a secret stands in the environment and in the address of the store."""
    before = os.environ.get("HF_TOKEN")
    os.environ["HF_TOKEN"] = TOKEN
    try:
        return wrapq.run("demo", [*SMALL, f"paths.outputs={outputs}", f"tracking.uri=sqlite:///{outputs}/runs.db"])
    finally:
        os.environ.pop("HF_TOKEN")
        if before is not None:
            os.environ["HF_TOKEN"] = before
