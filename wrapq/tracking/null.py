"""A tracker that records nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wrapq.tracking.base import FINISHED, Tracker


class NullTracker(Tracker):
    """What the engine is given when tracking is off."""

    def start(
        self, name: str, tags: Mapping[str, Any], params: Mapping[str, Any], folder: Path, *, wait: bool = True
    ) -> None:
        """Do nothing."""

    def ready(self) -> None:
        """Do nothing."""

    @property
    def run_id(self) -> str | None:
        """None."""
        return None

    @property
    def run_url(self) -> str | None:
        """None."""
        return None

    def params(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def tags(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Do nothing."""

    def curves(self, values: Mapping[str, Sequence[float]]) -> None:
        """Do nothing."""

    def dataset(
        self, name: str, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """Do nothing."""

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Do nothing."""

    def text(self, name: str, content: str) -> None:
        """Do nothing."""

    def register(self, name: str, alias: str | None, description: str, tags: Mapping[str, Any]) -> None:
        """Do nothing."""

    def finish(self, status: str = FINISHED, reason: str | None = None) -> None:
        """Do nothing."""
