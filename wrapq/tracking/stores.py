"""Which store a run is recorded in, and how it is looked at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wrapq.redact import redact
from wrapq.tracking.base import Tracker, TrackingError
from wrapq.tracking.null import NullTracker

if TYPE_CHECKING:
    from wrapq.recipe.schema import Settings

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def make_tracker(settings: Settings) -> Tracker:
    """The tracker that `settings.tracking` asks for; imports nothing heavy and writes nothing before `start`."""
    if not settings.tracking.enabled:
        return NullTracker()
    from wrapq.tracking.mlflow import MLflowTracker

    return MLflowTracker(store_uri(settings), settings.tracking.experiment, Path(settings.paths.outputs))


def store_uri(settings: Settings) -> str:
    """`tracking.uri`, or when it is not set the database `mlflow.db` in the outputs folder."""
    return settings.tracking.uri or f"sqlite:///{Path(settings.paths.outputs).expanduser().resolve() / 'mlflow.db'}"


def is_remote(uri: str) -> bool:
    """Whether the store is reached over a network."""
    return "://" in uri and not uri.startswith(("sqlite:", "file:"))


def artifact_location(uri: str, outputs: Path) -> str | None:
    """Where a new experiment keeps its files: `mlartifacts` in the outputs folder for a database, else the server says.

    The location is absolute, so that it means the same from every working directory.
    """
    if uri.split("://")[0].split("+")[0] not in DATABASES:
        return None
    return (Path(outputs).expanduser().resolve() / "mlartifacts").as_uri()


def ui_command(uri: str, outputs: Path, host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """The command that serves the store in a browser.

    Raises:
        TrackingError: the store is a server, which has its own pages, or nothing was recorded in it yet.
    """
    if uri.startswith(("http://", "https://")):
        raise TrackingError(f"the tracking store is already served: open {redact(uri)}")
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise TrackingError(f"nothing has been recorded yet: '{uri.removeprefix('sqlite:///')}' does not exist")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    location = artifact_location(uri, outputs)
    return [*command, *(("--default-artifact-root", location) if location else ()), "--host", host, "--port", str(port)]
