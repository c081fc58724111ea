"""Sending later what a tracking server did not take when the runs were made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wrapq.redact import HIDDEN, redact
from wrapq.tracking.base import StoreAwayError, TrackingError
from wrapq.tracking.outbox import EVENTS, FOLDER, SWEEP, Outbox

State = Literal["sent", "nothing", "running", "away", "refused"]


@dataclass(frozen=True)
class Synced:
    """What became of one run's outbox.

    Attributes:
        folder: the run's folder.
        state: `sent` now, `nothing` to send, still `running`, its store `away`, or `refused`.
        count: records sent now.
        left: records still to be sent.
        reason: why something is left, or what the store will never take.
        run_url: the run's page, where a server shows it.
    """

    folder: Path
    state: State
    count: int = 0
    left: int = 0
    reason: str = ""
    run_url: str | None = None


def find_outboxes(folder: Path) -> list[Outbox]:
    """The outboxes of the run in `folder`, or of all runs below it; raises `TrackingError` when there is none."""
    if not folder.is_dir():
        raise TrackingError(f"{folder} is no folder: name that of a run, or of many")
    found = [Outbox(events.parent.parent) for events in sorted(folder.rglob(f"{FOLDER}/{EVENTS}"))]
    if not found:
        raise TrackingError(f"{folder} holds no run that was recorded")
    return sorted(found, key=lambda outbox: SWEEP in outbox.tags())  # a sweep before its jobs


def sync(folder: Path, uri: str | None = None, experiment: str | None = None) -> Iterator[Synced]:
    """Send what waits in the outboxes under `folder`, in order; what was sent before is not sent again.

    Args:
        folder: of a run, or of many.
        uri: the store, where it is not the one that the run was told of, or that one's address holds a password.
        experiment: likewise the experiment.

    Raises:
        TrackingError: there is nothing under `folder` that was ever recorded.
    """
    for outbox in find_outboxes(folder):
        with outbox.locked() as mine:
            yield _sync(outbox, uri, experiment) if mine else Synced(outbox.run_folder, "running")


def _sync(outbox: Outbox, uri: str | None, experiment: str | None) -> Synced:
    if not outbox.finished():
        outbox.close_for_the_dead()
    before, count = outbox.sent(), outbox.count()
    if before.count >= count and not (before.run_id and outbox.parent()):
        return Synced(outbox.run_folder, "nothing", run_url=before.run_url)
    said = outbox.opening()
    uri = uri or before.uri or said["uri"]
    if reason := _unfit(uri, before.uri or said["uri"], before.run_id):
        return Synced(outbox.run_folder, "refused", 0, count - before.count, reason)
    state: State = "sent"
    try:
        _deliver(outbox, uri, experiment or said["experiment"], Path(said["outputs"]))
    except StoreAwayError:
        state = "away"
    except TrackingError:
        state = "refused"
    sent = outbox.sent()
    reason = sent.reason or "; ".join(sent.rejected[len(before.rejected) :])
    return Synced(outbox.run_folder, state, sent.count - before.count, count - sent.count, reason, sent.run_url)


def _unfit(uri: str, first: str, run_id: str | None) -> str:
    """Why the rest of a run cannot go to `uri`, when its beginning went to `first`; empty when it can."""
    if HIDDEN in uri:
        return f"the address {redact(uri)} held a secret, which is not kept: say it again with tracking.uri=..."
    if run_id is not None and redact(uri) != first:
        return f"the run's beginning is in {first} already, as {run_id}: the rest cannot go to {redact(uri)}"
    return ""


def _deliver(outbox: Outbox, uri: str, experiment: str, outputs: Path) -> None:
    from wrapq.tracking.deliver import deliver
    from wrapq.tracking.mlflow_store import Store, load_mlflow

    load_mlflow()
    deliver(outbox, Store(uri, experiment, outputs))
