"""Sending what waits in an outbox: in order, in batches, and so that what was sent is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from wrapq.redact import redact
from wrapq.tracking.base import StoreAwayError, TrackingError
from wrapq.tracking.mlflow_store import Store
from wrapq.tracking.outbox import OPEN, PARENT, SWEEP, Event, Lane, Outbox, Sent

BATCH = 1000  # MLflow's limits of one batch
PARAMS, TAGS = 100, 100
_LOGGED = frozenset({"params", "tags", "metrics"})


@dataclass
class Batch:
    """Events that go in one call, and where in the file they end."""

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    end: int = 0

    def takes(self, event: Event) -> bool:
        """Whether there is room; a parameter is not said twice in one call, which would hide a change."""
        values = event.arguments.get("values", {})
        params = len(self.params) + (len(values) if event.method == "params" else 0)
        tags = len(self.tags) + (len(values) if event.method == "tags" else 0)
        metrics = len(self.metrics) + len(event.arguments.get("points", ()))
        again = event.method == "params" and not self.params.keys().isdisjoint(values)
        return not again and params <= PARAMS and tags <= TAGS and params + tags + metrics <= BATCH

    def add(self, event: Event) -> None:
        """Take an event."""
        self.events.append(event)
        if event.method == "metrics":
            time = event.arguments["time"]
            self.metrics += [(key, value, time, step) for key, value, step in event.arguments["points"]]
        else:
            getattr(self, event.method).update(event.arguments["values"])


def batches(outbox: Outbox, lane: Lane, offset: int) -> Iterator[Batch]:
    """What a lane still has to send: parameters, tags and metrics that follow each other go together."""
    batch = Batch()
    for event, end in outbox.read(offset):
        if event.lane != lane or event.method == OPEN:
            continue
        alone = event.method not in _LOGGED
        if batch.events and (alone or not batch.takes(event)):
            yield batch
            batch = Batch()
        if alone:
            yield Batch(events=[event], end=end)
        else:
            batch.add(event)
            batch.end = end
    if batch.events:
        yield batch


def deliver(outbox: Outbox, store: Store) -> None:
    """Send everything that waits, numbers before files; what is known of it is written down after each call.

    Raises:
        StoreAwayError: the store cannot take more now.
        TrackingError: the store refuses the run.
    """
    sent = outbox.sent()
    try:
        _open(outbox, store, sent)
        _link(outbox, store, sent)
        for lane in ("record", "files"):
            for batch in batches(outbox, lane, getattr(sent, lane)):
                _send(outbox, store, sent, batch)
                setattr(sent, lane, batch.end)
                sent.count += len(batch.events)
                outbox.write_sent(sent)
    except TrackingError as error:
        sent.state, sent.reason = ("away" if isinstance(error, StoreAwayError) else "refused"), str(error)
        outbox.write_sent(sent)
        raise
    if sent.state != "open":
        sent.state, sent.reason = "open", ""
        outbox.write_sent(sent)


def _open(outbox: Outbox, store: Store, sent: Sent) -> None:
    if store.run_id is not None:
        return
    said = outbox.opening()
    tried = sent.tried
    sent.tried = True
    outbox.write_sent(sent)
    store.open(said["name"], said["key"], said["tags"], said["time"], sent.run_id, tried)
    sent.count += sent.run_id is None  # the opening is an event too
    sent.run_id, sent.uri, sent.run_url = store.run_id, redact(store.uri), store.run_url
    sent.state, sent.reason = "open", ""
    sent.linked |= SWEEP not in said["tags"] or PARENT in said["tags"]
    outbox.write_sent(sent)


def _link(outbox: Outbox, store: Store, sent: Sent) -> None:
    """Make a job's run a child of its sweep's, when the sweep's had no id yet at the job's start."""
    if not sent.linked and (parent := outbox.parent()) is not None:
        store.call("log", {"params": {}, "tags": {PARENT: parent}, "metrics": []})
        sent.linked = True
        outbox.write_sent(sent)


def _send(outbox: Outbox, store: Store, sent: Sent, batch: Batch) -> None:
    if batch.events[0].method in _LOGGED:
        try:
            store.call("log", {"params": batch.params, "tags": batch.tags, "metrics": batch.metrics})
        except StoreAwayError:
            raise
        except TrackingError as error:
            if len(batch.events) == 1:
                sent.rejected.append(f"{batch.events[0].method}: {error}")
                return
            for event in batch.events:  # one of them spoils it for all
                single = Batch()
                single.add(event)
                _send(outbox, store, sent, single)
        return
    (event,) = batch.events
    try:
        store.call(event.method, _located(outbox, event))
    except StoreAwayError:
        raise
    except TrackingError as error:
        sent.rejected.append(f"{event.method}: {error}")


def _located(outbox: Outbox, event: Event) -> dict[str, Any]:
    """The event's arguments; a file in the run's folder is looked for where the folder is now."""
    if event.method != "artifact":
        return event.arguments
    return event.arguments | {"path": str(outbox.run_folder / event.arguments["path"])}
