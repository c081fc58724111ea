"""What a tracker is: the one interface through which the engine writes down a run."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wrapq.errors import WrapqError

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"


class TrackingError(WrapqError):
    """A tracking store that cannot be opened. Only raised when a run is opened: later trouble never stops a run."""

    exit_code = 6


class Tracker(ABC):
    """The record of one run.

    Only `start` (and what waits for it: `ready`, `run_id`, `run_url`) may raise. Everything after it is kept in order,
    and a failure to send is logged once and remembered in `problems`. As a context manager a tracker finishes its run:
    FAILED with the error, KILLED on Ctrl-C, FINISHED otherwise.

    Attributes:
        problems: what could not be recorded, one line each.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []

    def prepare(self) -> None:  # noqa: B027 - a tracker may have nothing to begin
        """Begin, beside the caller's work, what opening the run will need; writes nothing and never raises."""

    @abstractmethod
    def start(
        self,
        name: str,
        tags: Mapping[str, Any],
        params: Mapping[str, Any],
        *,
        wait: bool = True,
        run_id: str | None = None,
    ) -> None:
        """Open the run, or again the one called `run_id` where the store holds it; raises `TrackingError`.

        With `wait=False` the store opens in the background: see `ready`.
        """

    @abstractmethod
    def ready(self) -> None:
        """Wait until the run is open; raises `TrackingError` when it could not be."""

    @property
    @abstractmethod
    def run_id(self) -> str | None:
        """The run's id in the store; None when nothing is recorded."""

    @property
    @abstractmethod
    def run_url(self) -> str | None:
        """Where a browser shows the run; None for a local store, which has no address until `wrapq ui` serves it."""

    @abstractmethod
    def params(self, values: Mapping[str, Any]) -> None:
        """What the run was asked to do; nested mappings become dotted names."""

    @abstractmethod
    def tags(self, values: Mapping[str, Any]) -> None:
        """What the run is: digests, versions, names."""

    @abstractmethod
    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """What the run measured."""

    @abstractmethod
    def curves(self, values: Mapping[str, Sequence[float]]) -> None:
        """Metrics over an index, such as the layer: value i of a curve is recorded at step i."""

    @abstractmethod
    def dataset(
        self, name: str, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """Data the run read: `context` says for what (`calibration`, `evaluation`), `profile` how much."""

    @abstractmethod
    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file, or a folder with all it holds. It is read when it is sent: it must stay until `finish` returns."""

    @abstractmethod
    def text(self, name: str, content: str) -> None:
        """A text artifact called `name` (`report/errors.txt`), with secrets blanked out."""

    @abstractmethod
    def finish(self, status: str = FINISHED, reason: str | None = None) -> None:
        """Close the run, after everything before it was sent. A second call does nothing. Never raises."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish(FINISHED)
        elif isinstance(error, KeyboardInterrupt):
            self.finish(KILLED, "interrupted")
        else:
            self.finish(FAILED, f"{type(error).__name__}: {error}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and leaf values of nested mappings; lists are leaves, written as JSON; an empty mapping is `{}`."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        elif isinstance(value, Mapping | list | tuple):
            yield name, json.dumps(value, default=str)
        else:
            yield name, value
