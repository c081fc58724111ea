"""The process that sends the outboxes of runs: `python -m wrapq.tracking.worker`, not to be run by hand.

Importing MLflow takes longer than many a small run, and a thread that does it slows the others; so it happens here.
A line of the input names an outbox and its store, another one with the same folder ends that run. The input ends with
the process of the runs: a run whose outbox has no end by then died with it, and is closed as killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from wrapq.ownership import InUseError
from wrapq.tracking.base import StoreAwayError, TrackingError
from wrapq.tracking.delivery import deliver
from wrapq.tracking.mlflow_store import MLflowStore, load_mlflow
from wrapq.tracking.outbox import Outbox

POLL = 0.1  # seconds between looks at the outbox
PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds before a store that is away is tried again
LOCK_SECONDS = 30.0


def main() -> None:
    """Send the events of each run until it ends and all are sent, or the store cannot be reached."""
    # they reach the whole group, and the run's end still has to be sent
    for reason in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # Windows has no SIGHUP
        signal.signal(reason, signal.SIG_IGN)
    load_mlflow()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    senders: list[threading.Thread] = []
    going: dict[str, threading.Event] = {}
    while line := sys.stdin.readline():
        for stream in (sys.stdout, sys.stderr):  # what MLflow and its libraries say would stand among the run's output
            os.dup2(nowhere, stream.fileno())
        where = json.loads(line)
        if (ended := going.pop(where["folder"], None)) is not None:
            ended.set()
        else:
            ended = going[where["folder"]] = threading.Event()
            senders.append(threading.Thread(target=send, args=(where, ended)))
            senders[-1].start()
    for ended in going.values():
        ended.set()
    for sender in senders:
        sender.join()


def send(where: Mapping[str, str], ended: threading.Event) -> None:
    """Send new events of one run until it has `ended`; then once more. `where` says its folder and the store."""
    outbox, pause = Outbox(Path(where["folder"])), PAUSE
    store = MLflowStore(where["uri"], where["experiment"], Path(where["outputs"]))
    with suppress(InUseError), outbox.owned(LOCK_SECONDS):
        while True:
            last = ended.is_set()
            if last and not outbox.finished():
                outbox.close_abandoned()
            try:
                deliver(outbox, store)
                pause, wait = PAUSE, POLL
            except StoreAwayError:
                pause, wait = min(2 * pause, LONGEST_PAUSE), pause
            except TrackingError:
                return
            if last:
                return
            ended.wait(wait)


if __name__ == "__main__":
    main()
