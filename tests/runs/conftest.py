"""A finished run of the default recipe, recorded nowhere but in its folder, looked at from there."""

from __future__ import annotations

from pathlib import Path

import pytest

import wrapq
from tests.engine.record import SMALL
from wrapq.engine.record import RunResult


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="session")
def finished(outputs: Path) -> RunResult:
    return wrapq.run("demo", [*SMALL, "tracking=none", f"paths.outputs={outputs}"])
