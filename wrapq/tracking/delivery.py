"""Sending the events of an outbox: in order, in batches, and recording how far they got."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from wrapq.redact import redact
from wrapq.tracking.base import StoreAwayError, TrackingError
from wrapq.tracking.mlflow_store import MLflowStore
from wrapq.tracking.outbox import OPEN, PARENT, SWEEP, Event, Lane, Outbox, Sent

BATCH = 1000  # MLflow's limits of one batch
PARAMS, TAGS = 100, 100
_LOGGED = frozenset({"params", "tags", "metrics"})


@dataclass
class Bundle:
    """Events that go in one call, and the offset in the file at which they end."""

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    end: int = 0

    def takes(self, event: Event) -> bool:
        """Whether there is room; a parameter is not opening twice in one call, which would hide a change."""
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


def bundles(outbox: Outbox, lane: Lane, offset: int) -> Iterator[Bundle]:
    """The calls that a lane still has to make: parameters, tags and metrics that follow each other go together."""
    bundle = Bundle()
    for event, end in outbox.read(offset):
        if event.lane != lane or event.method == OPEN:
            continue
        alone = event.method not in _LOGGED
        if bundle.events and (alone or not bundle.takes(event)):
            yield bundle
            bundle = Bundle()
        if alone:
            yield Bundle(events=[event], end=end)
        else:
            bundle.add(event)
            bundle.end = end
    if bundle.events:
        yield bundle


def deliver(outbox: Outbox, store: MLflowStore) -> None:
    """Send everything that waits, numbers before files; progress is recorded after each call.

    Raises:
        StoreAwayError: the store cannot take more now.
        TrackingError: the store refuses the run.
    """
    sent = outbox.sent()
    try:
        if not store.run_id:
            _open(outbox, store, sent)
        if not sent.linked and (parent := outbox.parent()) is not None:  # the sweep's run had no id at the job's start
            store.call("log", {"params": {}, "tags": {PARENT: parent}, "metrics": []})
            sent.linked = True
            outbox.write_sent(sent)
        for lane in ("record", "files"):
            for bundle in bundles(outbox, lane, getattr(sent, lane)):
                _send(outbox, store, sent, bundle)
                setattr(sent, lane, bundle.end)
                sent.count += len(bundle.events)
                outbox.write_sent(sent)
    except TrackingError as error:
        sent.state, sent.reason = ("away" if isinstance(error, StoreAwayError) else "refused"), str(error)
        outbox.write_sent(sent)
        raise
    if sent.state != "open":
        sent.state, sent.reason = "open", ""
        outbox.write_sent(sent)


def _open(outbox: Outbox, store: MLflowStore, sent: Sent) -> None:
    opening = outbox.opening()
    tried = sent.tried
    sent.tried = True
    outbox.write_sent(sent)
    store.open(opening["name"], opening["key"], opening["tags"], opening["time"], sent.run_id, tried)
    sent.count += sent.run_id is None  # the opening is an event too
    sent.run_id, sent.uri, sent.run_url = store.run_id, redact(store.uri), store.run_url
    sent.state, sent.reason = "open", ""
    sent.linked |= SWEEP not in opening["tags"] or PARENT in opening["tags"]
    outbox.write_sent(sent)


def _send(outbox: Outbox, store: MLflowStore, sent: Sent, bundle: Bundle) -> None:
    """Make one call; of a bundle that the store will not take, each event by itself."""
    first = bundle.events[0]
    try:
        if first.method in _LOGGED:
            store.call("log", {"params": bundle.params, "tags": bundle.tags, "metrics": bundle.metrics})
        elif first.method == "artifact":  # the run's folder may lie elsewhere now
            store.call("artifact", {**first.arguments, "path": str(outbox.run_folder / first.arguments["path"])})
        else:
            store.call(first.method, first.arguments)
    except StoreAwayError:
        raise
    except TrackingError as error:
        if len(bundle.events) == 1:
            sent.rejected.append(f"{first.method}: {error}")
            return
        for event in bundle.events:
            single = Bundle()
            single.add(event)
            _send(outbox, store, sent, single)
