"""Runs recorded in MLflow."""

from __future__ import annotations

import getpass
import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wrapq.tracking.base import FINISHED, Tracker, TrackingError, flatten
from wrapq.tracking.mlflow_store import entity_key, entity_value
from wrapq.tracking.redact import redact, redact_value
from wrapq.tracking.remote import RemoteStore

PARAM_LENGTH = 6000  # MLflow's limits
TAG_LENGTH = 8000
PARAMS_PER_BATCH = 100
METRICS_PER_BATCH = 1000
DIGEST_LENGTH = 36
GIVE_UP = 3  # failures in a row after which the store is taken to be gone
DRAIN_SECONDS = 120.0  # how long `finish` waits for what is still to be sent

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """One call on the store: `method` of `Store`, for the run that is open."""

    method: str
    arguments: dict[str, Any] = field(default_factory=dict)


class MLflowTracker(Tracker):
    """A run in an MLflow store.

    One thread, started by `start`, opens the store and then sends every event in order; the caller never waits for
    the store except in `ready` and `finish`. Every call goes through `_send`, as an event that can be written down.

    Args:
        uri: the tracking URI of the store.
        experiment: name of the experiment; created when there is none.
        outputs: folder under which a new experiment in a database keeps its artifacts.
    """

    def __init__(self, uri: str, experiment: str, outputs: Path) -> None:
        super().__init__()
        self.store = RemoteStore(uri, experiment, outputs)
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._opened = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._finished = False
        self._failures = 0
        self._lost = 0

    def prepare(self) -> None:
        """Start the process that imports MLflow."""
        self.store.start()

    def start(
        self,
        name: str,
        tags: Mapping[str, Any],
        params: Mapping[str, Any],
        *,
        wait: bool = True,
        run_id: str | None = None,
    ) -> None:
        """Open the run, or again the one called `run_id`, and record its tags and parameters.

        A process of its own imports MLflow and opens the store, which takes two seconds, four when the database is
        new. With `wait=False` that happens beside the caller's work.

        Raises:
            TrackingError: the store cannot be opened or the run not be created (with `wait=False`: from `ready`).
        """
        if self._thread is not None:
            raise TrackingError("the run was started before: a tracker records one run")
        self.store.start()
        all_tags = _texts(tags, TAG_LENGTH) | {"mlflow.source.name": "wrapq", "mlflow.user": _user()}
        self._thread = threading.Thread(target=self._work, args=(name, all_tags, run_id), daemon=True)
        self._thread.start()
        if wait:
            self.ready()
        self.params(params)

    def ready(self) -> None:
        """Wait until the run is open; raises `TrackingError` when it could not be."""
        if self._thread is None:
            raise TrackingError("the run has not been started")
        self._opened.wait()
        if self._error is not None:
            raise self._error if isinstance(self._error, TrackingError) else TrackingError(redact(str(self._error)))

    @property
    def run_id(self) -> str | None:
        """The run's id; waits until the run is open."""
        self.ready()
        return self.store.run_id

    @property
    def run_url(self) -> str | None:
        """The run's page on a tracking server; None for a local store. Waits until the run is open."""
        self.ready()
        return self.store.run_url

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters; a value beyond MLflow's length limit is cut and says so."""
        texts = list(_texts(values, PARAM_LENGTH).items())
        for start in range(0, len(texts), PARAMS_PER_BATCH):
            self._send("params", values=dict(texts[start : start + PARAMS_PER_BATCH]))

    def tags(self, values: Mapping[str, Any]) -> None:
        """Record tags; a value beyond MLflow's length limit is cut and says so."""
        texts = list(_texts(values, TAG_LENGTH).items())
        for start in range(0, len(texts), PARAMS_PER_BATCH):
            self._send("tags", values=dict(texts[start : start + PARAMS_PER_BATCH]))

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics, at `step` 0 when none is given."""
        self._send_metrics([(key, float(value), step or 0) for key, value in values.items()])

    def curves(self, values: Mapping[str, Sequence[float]]) -> None:
        """Record every value of every curve at its index."""
        self._send_metrics([(key, float(v), i) for key, curve in values.items() for i, v in enumerate(curve)])

    def dataset(
        self, name: str, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """Record a data set as an input; the whole digest is its tag `digest`, MLflow's own field holds 36 letters."""
        redacted = {key: value for key, value in flatten(profile or {}) if redact_value(key, value) == str(value)}
        self._send(
            "dataset",
            name=redact(name)[:500],
            digest=digest[:DIGEST_LENGTH],
            source=redact(source),
            profile=redacted,
            tags={"mlflow.data.context": context, "digest": digest},
        )

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Record a file or folder; a file that is not there is a problem, not an error."""
        self._send("artifact", path=str(Path(path).resolve()), folder=folder)

    def text(self, name: str, content: str) -> None:
        """Record a text as an artifact, secrets blanked out."""
        self._send("text", name=name, content=redact(content))

    def finish(self, status: str = FINISHED, reason: str | None = None) -> None:
        """Send what is left and close the run with `status`; `reason` becomes the tag `failure`."""
        if self._thread is None:
            self.store.close()
            return
        if self._finished:
            return
        if reason:
            self.tags({"failure": reason})
        self._send("finish", status=status, time=_now())
        self._finished = True
        self._events.put(None)
        self._thread.join(DRAIN_SECONDS)
        if self._thread.is_alive():
            self._problem(f"the store did not take everything within {DRAIN_SECONDS:.0f} s")
        if self._lost:
            self._problem(f"{self._lost} later records were not sent: the store was gone")

    def _send_metrics(self, points: list[tuple[str, float, int]]) -> None:
        now = _now()
        named = [(entity_key(key), value, step) for key, value, step in points]
        for start in range(0, len(named), METRICS_PER_BATCH):
            self._send("metrics", points=named[start : start + METRICS_PER_BATCH], time=now)

    def _send(self, method: str, **arguments: Any) -> None:
        """Hand one event to the sending thread; never raises and never waits."""
        if self._finished:
            self._problem(f"{method} after the run was finished")
        else:
            self._events.put(Event(method, arguments))

    def _work(self, name: str, tags: dict[str, str], run_id: str | None) -> None:
        try:
            self.store.open(name, tags, run_id)
        except BaseException as error:
            self._error = error
            self.store.close()
            return
        finally:
            self._opened.set()
        while (event := self._events.get()) is not None:
            self._deliver(event)
        self.store.close()

    def _deliver(self, event: Event) -> None:
        last = event.method == "finish"  # always tried: a run must not stay open because one record failed
        if self._failures >= GIVE_UP and not last:
            self._lost += 1
            return
        try:
            self.store.call(event.method, **event.arguments)
            self._failures = 0
        except Exception as error:
            self._failures += 1
            self._problem(f"{event.method}: {error}")

    def _problem(self, what: str) -> None:
        line = redact(what)
        if not self.problems:
            _log.warning("tracking: %s (the run goes on; later trouble is kept for the end)", line)
        self.problems.append(line)


def _texts(values: Mapping[str, Any], limit: int) -> dict[str, str]:
    return {entity_key(key): entity_value(redact_value(key, value), limit) for key, value in flatten(values)}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return "unknown"


def _now() -> int:
    return int(time.time() * 1000)
