"""Addresses of tracking stores, and how a store is looked at."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wrapq.redact import redact
from wrapq.tracking.base import TrackingError

if TYPE_CHECKING:
    from wrapq.recipe.schema import Settings

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def store_uri(settings: Settings) -> str:
    """`tracking.uri`, or when it is not set the database `mlflow.db` in the outputs folder.

    Raises:
        TrackingError: an address cannot hold the name of that folder.
    """
    if settings.tracking.uri:
        return settings.tracking.uri
    database = Path(settings.paths.outputs).expanduser().resolve() / "mlflow.db"
    if found := re.search(r"\?|%[0-9A-Fa-f]{2}|[\ud800-\udfff]", str(database)):
        raise TrackingError(
            f"the address of '{database}' would mean another file, for its {found[0]!r}: choose another folder with "
            "paths.outputs=FOLDER or another store with tracking.uri=..., or run without tracking: "
            "tracking.enabled=false"
        )
    return f"sqlite:///{database}"


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
    """The command that serves the store in a browser; raises `TrackingError` where it is a server, which has its own
    pages, or nothing was recorded in it yet."""
    if uri.startswith(("http://", "https://")):
        raise TrackingError(f"the tracking store is already served: open {redact(uri)}")
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise TrackingError(f"nothing has been recorded yet: '{uri.removeprefix('sqlite:///')}' does not exist")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    location = artifact_location(uri, outputs)
    return [*command, *(("--default-artifact-root", location) if location else ()), "--host", host, "--port", str(port)]
