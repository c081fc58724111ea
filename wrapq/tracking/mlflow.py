"""Runs recorded in MLflow."""

from __future__ import annotations

import getpass
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wrapq.redact import redact, redact_value
from wrapq.tracking.base import FINISHED, Tracker, TrackingError, flatten
from wrapq.tracking.names import PARAM_LENGTH, TAG_LENGTH, entity_key, entity_value
from wrapq.tracking.outbox import FINISH, OPEN, REOPEN, Event, Outbox
from wrapq.tracking.sender import Sender
from wrapq.tracking.stores import is_remote

PER_EVENT = 100  # parameters or tags
METRICS_PER_EVENT = 1000
DIGEST_LENGTH = 36
OPEN_SECONDS = 5.0  # how long a run waits to hear whether a server takes it
LOCK_SECONDS = 15.0

_log = logging.getLogger(__name__)


class MLflowTracker(Tracker):
    """A run in an MLflow store.

    Every call is written to the outbox in the run's folder, and that is all the caller waits for. A process of its own
    sends what is there, tries again when the store was away, and is given some time at the end; what it could not send
    stays in the outbox for `wrapq sync`.

    Args:
        uri: the tracking URI of the store.
        experiment: name of the experiment; created when there is none.
        outputs: folder under which a new experiment in a database keeps its artifacts.
    """

    def __init__(self, uri: str, experiment: str, outputs: Path) -> None:
        super().__init__()
        self.uri, self.experiment, self.outputs = uri, experiment, Path(outputs)
        self.sender = Sender()
        self.outbox: Outbox | None = None
        self._finished = False

    def prepare(self) -> None:
        """Start the process that imports MLflow."""
        self.sender.prepare()

    def start(
        self, name: str, tags: Mapping[str, Any], params: Mapping[str, Any], folder: Path, *, wait: bool = True
    ) -> None:
        """Open the run and record its tags and parameters; in a folder that has a run, go on with that.

        A process of its own imports MLflow and opens the store, which takes two seconds, four when the database is
        new. With `wait=False` that happens beside the caller's work.

        Raises:
            TrackingError: the store cannot be opened or the run not be created (with `wait=False`: from `ready`).
        """
        if self.outbox is not None:
            raise TrackingError("the run was started before: a tracker records one run")
        self.outbox = Outbox(folder)
        if self.outbox.exists():
            self._take_up(self.outbox)
            self._send(REOPEN)
        else:
            own = {"mlflow.source.name": "wrapq", "mlflow.user": _user()}
            where = {"uri": redact(self.uri), "experiment": self.experiment, "outputs": str(self.outputs)}
            texts = _texts(tags, TAG_LENGTH) | own
            self._send(OPEN, name=name, key=uuid.uuid4().hex, tags=texts, time=_now(), **where)
        self.sender.follow(self.outbox, self.uri, self.experiment, self.outputs)
        self.params(params)
        if wait:
            self.ready()

    def ready(self) -> None:
        """Wait until the run is open, at most some seconds where the store is a server.

        Raises:
            TrackingError: the store refuses the run.
        """
        if self.outbox is None:
            raise TrackingError("the run has not been started")
        waited = 0.0
        while (sent := self.outbox.sent()).state == "waiting" and not self.sender.gone and waited < OPEN_SECONDS:
            time.sleep(0.02)
            waited += 0.02 * (is_remote(self.uri) and sent.tried)
        if sent.state == "refused":
            raise TrackingError(sent.reason)
        if sent.state != "open" and not self.problems:
            self._problem(
                f"{sent.reason or 'no answer yet'}\nthe run goes on, its record is kept in {self.outbox.path}"
            )

    @property
    def run_id(self) -> str | None:
        """The run's id; waits until the run is open, and is None when the store is away."""
        self.ready()
        return self.outbox.sent().run_id if self.outbox else None

    @property
    def run_url(self) -> str | None:
        """The run's page on a tracking server; None for a local store. Waits until the run is open."""
        self.ready()
        return self.outbox.sent().run_url if self.outbox else None

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters; a value beyond MLflow's length limit is cut and says so."""
        texts = list(_texts(values, PARAM_LENGTH).items())
        for start in range(0, len(texts), PER_EVENT):
            self._send("params", values=dict(texts[start : start + PER_EVENT]))

    def tags(self, values: Mapping[str, Any]) -> None:
        """Record tags; a value beyond MLflow's length limit is cut and says so."""
        texts = list(_texts(values, TAG_LENGTH).items())
        for start in range(0, len(texts), PER_EVENT):
            self._send("tags", values=dict(texts[start : start + PER_EVENT]))

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
        path = Path(path).resolve()
        if self.outbox is not None and path.is_relative_to(self.outbox.run_folder):
            path = path.relative_to(self.outbox.run_folder)  # the folder may be elsewhere when it is sent
        self._send("artifact", path=str(path), folder=folder)

    def text(self, name: str, content: str) -> None:
        """Record a text as an artifact, secrets blanked out."""
        self._send("text", name=name, content=redact(content))

    def register(self, name: str, alias: str | None, description: str, tags: Mapping[str, Any]) -> None:
        """Enter the artifact folder `model` in MLflow's model registry, after all artifacts before it."""
        self._send("register", name=name, alias=alias, description=redact(description), tags=_texts(tags, TAG_LENGTH))

    def finish(self, status: str = FINISHED, reason: str | None = None) -> None:
        """Close the run with `status`, and let what is left be sent; `reason` becomes the tag `failure`."""
        if self.outbox is None:
            self.sender.drop()
            return
        if self._finished:
            return
        if reason:
            self.tags({"failure": reason})
        self._send(FINISH, status=status, time=_now())
        self._finished = True
        self.sender.drain(self.outbox)
        self._tell(self.outbox)

    def _take_up(self, outbox: Outbox) -> None:
        """Make a run that was stopped ready to go on, once whoever still sends its end has done so."""
        with outbox.locked(LOCK_SECONDS):
            outbox.mend()
            sent = outbox.sent()
            sent.state = "waiting"
            outbox.write_sent(sent)

    def _tell(self, outbox: Outbox) -> None:
        """What was not recorded, and what can be done about it."""
        sent, count = outbox.sent(), outbox.count()
        for rejected in sent.rejected:
            self._problem(rejected)
        if sent.count < count:
            why = sent.reason or "the tracking process ended early"
            self._problem(
                f"{count - sent.count} of {count} records are not sent: {why}\n"
                f"they are kept; send them with: wrapq sync {outbox.run_folder}"
            )

    def _send_metrics(self, points: list[tuple[str, float, int]]) -> None:
        now = _now()
        named = [(entity_key(key), value, step) for key, value, step in points]
        for start in range(0, len(named), METRICS_PER_EVENT):
            self._send("metrics", points=named[start : start + METRICS_PER_EVENT], time=now)

    def _send(self, method: str, **arguments: Any) -> None:
        """Write one event down; never raises."""
        if self._finished:
            self._problem(f"{method} after the run was finished")
            return
        if self.outbox is None:
            self._problem(f"{method} before the run was started")
            return
        try:
            self.outbox.append(Event(method, arguments))
        except OSError as error:  # a full disk will stop the run itself soon enough
            self._problem(f"{method}: cannot write {self.outbox.events}: {error.strerror}")

    def _problem(self, what: str) -> None:
        line = redact(what)
        _log.warning("tracking: %s", line)
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
