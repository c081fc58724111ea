"""The process that sends a run's outbox: `python -m wrapq.tracking.serve`, not to be run by hand.

Importing MLflow takes longer than many a small run, and a thread that does it slows the others; so it happens here.
The first line of the input says whose outbox goes where. When the input ends, so has the run: if its outbox does not
say how, its process has died, and the run is closed as killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from wrapq.tracking.base import StoreAwayError, TrackingError
from wrapq.tracking.deliver import deliver
from wrapq.tracking.mlflow_store import Store, load_mlflow
from wrapq.tracking.outbox import Outbox

POLL = 0.1  # seconds between looks at the outbox
PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds before a store that is away is tried again
LOCK_SECONDS = 30.0


def main() -> None:
    """Send one run's events until the input ends and all are sent, or the store is away."""
    for reason in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the run's end still has to be sent
        signal.signal(reason, signal.SIG_IGN)
    load_mlflow()
    line = sys.stdin.readline()
    if not line:
        return
    where = json.loads(line)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):  # what MLflow and its libraries say would stand among the run's own output
        os.dup2(nowhere, stream.fileno())
    outbox = Outbox(Path(where["folder"]))
    with outbox.locked(LOCK_SECONDS) as mine:
        if mine:
            follow(outbox, Store(where["uri"], where["experiment"], Path(where["outputs"])), _end_of_input())


def follow(outbox: Outbox, store: Store, ended: threading.Event) -> None:
    """Send what comes until `ended`; then once more."""
    pause = PAUSE
    while True:
        last = ended.is_set()
        if last and not outbox.finished():
            outbox.close_for_the_dead()
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


def _end_of_input() -> threading.Event:
    ended = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    return ended


if __name__ == "__main__":
    main()
