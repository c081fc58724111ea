"""Runs recorded in MLflow."""

from __future__ import annotations

import getpass
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wrapq.redact import redact, redact_value
from wrapq.tracking.base import FINISHED, Tracker, TrackingError, flatten
from wrapq.tracking.names import PARAM_LENGTH, TAG_LENGTH, entity_key, entity_value
from wrapq.tracking.outbox import FINISH, OPEN, REOPEN, Event, Outbox
from wrapq.tracking.process import Sender
from wrapq.tracking.stores import is_remote, store_uri

if TYPE_CHECKING:
    from wrapq.recipe.schema import Settings

PER_EVENT = 100  # parameters or tags
METRICS_PER_EVENT = 1000
DIGEST_LENGTH = 36
OPEN_SECONDS = 5.0  # how long a run waits to hear whether a server takes it
LOCK_SECONDS = 15.0

_log = logging.getLogger(__name__)


def make_tracker(settings: Settings) -> Tracker:
    """The tracker that `settings.tracking` asks for; imports nothing heavy and writes nothing before `start`."""
    if not settings.tracking.enabled:
        return Tracker()
    return MLflowTracker(store_uri(settings), settings.tracking.experiment, Path(settings.paths.outputs))


class MLflowTracker(Tracker):
    """A run in an MLflow store.

    Every call is appended to the outbox in the run's folder, and the caller waits for no more. A separate process sends
    the events, tries again when the store could not be reached, and has some time at the end; what it could not send
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
        self.sender.prepare()

    def start(
        self, name: str, tags: Mapping[str, Any], params: Mapping[str, Any], folder: Path, *, wait: bool = True
    ) -> None:
        """Open the run and record its tags and parameters; in a folder that has a run, go on with that.

        A process of its own imports MLflow and opens the store, which takes two seconds, four when the database is
        new. With `wait=False` that happens beside the caller's work.
        """
        if self.outbox is not None:
            raise TrackingError("the run was started before: a tracker records one run")
        self.outbox = Outbox(folder)
        if self.outbox.exists():
            with self.outbox.owned(LOCK_SECONDS):  # until the process that may still send the run's end is done
                self.outbox.drop_partial_line()
                sent = self.outbox.sent()
                sent.state = "waiting"
                self.outbox.write_sent(sent)
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
        self.ready()
        return self.outbox.sent().run_id if self.outbox else None

    @property
    def run_url(self) -> str | None:
        self.ready()
        return self.outbox.sent().run_url if self.outbox else None

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters; a value beyond MLflow's length limit is cut and says so."""
        self._send_texts("params", _texts(values, PARAM_LENGTH))

    def tags(self, values: Mapping[str, Any]) -> None:
        self._send_texts("tags", _texts(values, TAG_LENGTH))

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        self._send_metrics([(key, float(value), step or 0) for key, value in values.items()])

    def curves(self, values: Mapping[str, Sequence[float]]) -> None:
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
        sent, count = self.outbox.sent(), self.outbox.count()
        for rejected in sent.rejected:
            self._problem(rejected)
        if sent.count < count:
            why = sent.reason or "the tracking process ended early"
            self._problem(
                f"{count - sent.count} of {count} records are not sent: {why}\n"
                f"they are kept; send them with: wrapq sync {self.outbox.run_folder}"
            )

    def _send_texts(self, method: str, values: dict[str, str]) -> None:
        items = list(values.items())
        for start in range(0, len(items), PER_EVENT):
            self._send(method, values=dict(items[start : start + PER_EVENT]))

    def _send_metrics(self, points: list[tuple[str, float, int]]) -> None:
        now = _now()
        named = [(entity_key(key), value, step) for key, value, step in points]
        for start in range(0, len(named), METRICS_PER_EVENT):
            self._send("metrics", points=named[start : start + METRICS_PER_EVENT], time=now)

    def _send(self, method: str, **arguments: Any) -> None:
        """Append one event; never raises."""
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
