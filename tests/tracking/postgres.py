"""A real PostgreSQL server for a test, from the package that ships one; as root it runs under a user of its own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def postgres() -> Iterator[str]:
    """The address of an empty database; skips the test where there is no PostgreSQL server to start."""
    pgserver = pytest.importorskip("pgserver", reason="pgserver, which ships PostgreSQL's binaries, is not installed")
    pytest.importorskip("psycopg2", reason="psycopg2-binary, by which MLflow speaks to PostgreSQL, is not installed")
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # the path of its socket must be short
    try:
        server = pgserver.get_server(folder / "data", cleanup_mode="delete")
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"PostgreSQL does not start here: {error}")
    try:
        server.psql("CREATE DATABASE mlflow;")
        yield server.get_uri("mlflow").replace("postgresql:", "postgresql+psycopg2:", 1)  # the driver that is installed
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)
