"""Sending the records that a tracking server did not take during the runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wrapq.ownership import InUseError
from wrapq.redact import HIDDEN, redact
from wrapq.tracking.base import StoreAwayError, TrackingError
from wrapq.tracking.delivery import deliver
from wrapq.tracking.mlflow_store import MLflowStore, load_mlflow
from wrapq.tracking.outbox import EVENTS, FOLDER, SWEEP, Outbox

State = Literal["sent", "nothing", "in use", "away", "refused"]


@dataclass(frozen=True)
class Synced:
    """The result for one run's outbox.

    Attributes:
        folder: the run's folder.
        state: `sent` now, `nothing` to send, `in use` by another process, its store `away`, or `refused`.
        count: records sent now.
        left: records still to be sent.
        reason: why records are left, or which the store rejects.
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
    """Send what waits in the outboxes under `folder`, in order; nothing is sent twice.

    Args:
        folder: of a run, or of many.
        uri: the store, where it is not the one of the run, or where its address holds a password.
        experiment: likewise the experiment.

    Raises:
        TrackingError: there is nothing under `folder` that was ever recorded.
    """
    for outbox in find_outboxes(folder):
        try:
            with outbox.owned():
                synced = _sync(outbox, uri, experiment)
        except InUseError as error:
            synced = Synced(outbox.run_folder, "in use", reason=str(error))
        yield synced


def _sync(outbox: Outbox, uri: str | None, experiment: str | None) -> Synced:
    if not outbox.finished():
        outbox.close_abandoned()
    before, count = outbox.sent(), outbox.count()
    if before.count >= count and not (before.run_id and outbox.parent()):
        return Synced(outbox.run_folder, "nothing", run_url=before.run_url)
    opening = outbox.opening()
    first, reason = before.uri or opening["uri"], ""
    uri = uri or first
    if HIDDEN in uri:
        reason = f"the address {redact(uri)} held a secret, which is not kept: say it again with tracking.uri=..."
    elif before.run_id is not None and redact(uri) != first:
        reason = f"the run's beginning is in {first} already, as {before.run_id}: the rest cannot go to {redact(uri)}"
    if reason:
        return Synced(outbox.run_folder, "refused", 0, count - before.count, reason)
    state: State = "sent"
    try:
        load_mlflow()
        deliver(outbox, MLflowStore(uri, experiment or opening["experiment"], Path(opening["outputs"])))
    except StoreAwayError:
        state = "away"
    except TrackingError:
        state = "refused"
    sent = outbox.sent()
    reason = sent.reason or "; ".join(sent.rejected[len(before.rejected) :])
    return Synced(outbox.run_folder, state, sent.count - before.count, count - sent.count, reason, sent.run_url)
