"""One finished run of the default recipe, recorded in MLflow, that several tests look at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import wrapq
from tests.engine.record import SMALL
from wrapq.engine.record import RunResult
from wrapq.tracking.process import one_process

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz123456"


@pytest.fixture(scope="package", autouse=True)
def sender() -> Iterator[None]:
    """One process sends the records of all runs of this folder, as it does in a sweep: it takes seconds to start."""
    with one_process():
        yield


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="session")
def finished(outputs: Path, new_store: Callable[[Path], None]) -> RunResult:
    """The run; a secret stands in the environment and in the address of the store."""
    new_store(outputs / "runs.db")
    before = os.environ.get("HF_TOKEN")
    os.environ["HF_TOKEN"] = TOKEN
    try:
        return wrapq.run("demo", [*SMALL, f"paths.outputs={outputs}", f"tracking.uri=sqlite:///{outputs}/runs.db"])
    finally:
        os.environ.pop("HF_TOKEN")
        if before is not None:
            os.environ["HF_TOKEN"] = before
