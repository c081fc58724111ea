"""The tracker contract: the one interface through which the engine records a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wrapq.errors import WrapqError

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"


class TrackingError(WrapqError):
    """A tracking store that refuses the run. Only raised when a run is opened: later trouble never stops a run."""

    exit_code = 6


class StoreAwayError(TrackingError):
    """A tracking store that cannot be reached or cannot serve just now: the same call may succeed later."""


class Tracker:
    """The record of one run; this one, which the engine is given when tracking is off, records nothing.

    A tracker for a store overrides what the store can take:

        class NotebookTracker(Tracker):
            def start(self, name, tags, params, folder, *, wait=True): ...
            def metrics(self, values, step=None): ...
            def finish(self, status=FINISHED, reason=None): ...

    Only `start` (and what waits for it: `ready`, `run_id`, `run_url`) may raise, and only where the store refuses the
    run: while a store cannot be reached, its records are only late. Records keep their order, and what could not be
    recorded is listed in `problems`. As a context manager a tracker finishes its run: FAILED with the error, KILLED on
    Ctrl-C, FINISHED otherwise.

    Attributes:
        problems: what could not be recorded yet, or ever, one line each.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []

    def prepare(self) -> None:
        """Begin, beside the caller's work, what opening the run will need; writes nothing and never raises."""

    def start(
        self, name: str, tags: Mapping[str, Any], params: Mapping[str, Any], folder: Path, *, wait: bool = True
    ) -> None:
        """Open the run, whose files lie in `folder`; with `wait=False` in the background: see `ready`.

        Raises:
            TrackingError: the store refuses the run.
        """

    def ready(self) -> None:
        """Wait until the run is open or its store cannot be reached; raises `TrackingError` when it was refused."""

    @property
    def run_id(self) -> str | None:
        """The run's id in the store; None when nothing is recorded, or not yet."""
        return None

    @property
    def run_url(self) -> str | None:
        """Where a browser shows the run; None for a local store, which has no address until `wrapq ui` serves it."""
        return None

    def params(self, values: Mapping[str, Any]) -> None:
        """Record what the run was asked to do; nested mappings become dotted names."""

    def tags(self, values: Mapping[str, Any]) -> None:
        """Record what the run is: digests, versions, names."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record what the run measured."""

    def curves(self, values: Mapping[str, Sequence[float]]) -> None:
        """Record metrics over an index, such as the layer: value i of a curve at step i."""

    def dataset(
        self, name: str, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """Record data that the run read: `context` is `calibration` or `evaluation`, `profile` the amount."""

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Record a file, or a folder with all it holds. It is read when it is sent: it must stay where it is."""

    def text(self, name: str, content: str) -> None:
        """Record a text artifact called `name` (`report/errors.txt`), with secrets blanked out."""

    def register(self, name: str, alias: str | None, description: str, tags: Mapping[str, Any]) -> None:
        """Enter the artifact folder `model` in the registry of models as the next version of `name`."""

    def finish(self, status: str = FINISHED, reason: str | None = None) -> None:
        """Close the run, and wait for what is still to be sent as long as the store takes it.

        A second call does nothing. Never raises.
        """

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
