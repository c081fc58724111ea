"""The other end of `wrapq.tracking.remote`: `python -m wrapq.tracking.serve`, not to be run by hand."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from wrapq.tracking.mlflow_store import Store, load_mlflow
from wrapq.tracking.redact import redact


def main() -> None:
    """Serve one run's store until the input ends."""
    for reason in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the run's end still has to be sent
        signal.signal(reason, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what MLflow prints must not mix with the answers
    load_mlflow()
    serve(sys.stdin, answers)


def serve(calls: TextIO, answers: TextIO) -> None:
    """Answer each line of `calls`; close the run as killed when they end before it was finished."""
    store: Store | None = None
    finished = False
    for line in calls:
        call = json.loads(line)
        try:
            if call["method"] == "open":
                store = _open(**call["arguments"])
                result: Any = {"run_id": store.run_id, "run_url": store.run_url}
            else:
                result = getattr(store, call["method"])(**call["arguments"])
            finished |= call["method"] == "finish"
            answer = {"result": result}
        except Exception as error:  # whatever it is, the other end decides what to make of it
            known = type(error).__name__ == "TrackingError"
            answer = {"error": redact(str(error) if known else f"{type(error).__name__}: {error}")}
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except OSError:  # nobody reads any more: the run's process died between a call and its answer
            break
    if store is not None and not finished:
        store.tags({"failure": "the process of the run ended without a word"})
        store.finish("KILLED", int(time.time() * 1000))


def _open(uri: str, experiment: str, outputs: str, name: str, tags: dict[str, str], run_id: str | None = None) -> Store:
    store = Store(uri, experiment, Path(outputs))
    store.open(name, tags, run_id)
    return store


if __name__ == "__main__":
    main()
