"""The MLflow store in a process of its own, so that a run neither imports MLflow nor waits for it.

Importing MLflow takes longer than many a small run, and a thread that does it slows the others. The process speaks
JSON, one line per call and one per answer, over its standard input and output. When its input ends before the run was
finished, the run's process has died, and the run is closed as killed.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wrapq.tracking.base import TrackingError


class RemoteStore:
    """A `wrapq.tracking.mlflow_store.Store` behind a pipe; started by `open`.

    Attributes:
        uri: the tracking URI of the store.
        run_id: after `open`, the run's id.
        run_url: after `open`, its page on a tracking server, or None.
    """

    def __init__(self, uri: str, experiment: str, outputs: Path) -> None:
        self.uri, self.experiment, self.outputs = uri, experiment, Path(outputs)
        self.run_id: str | None = None
        self.run_url: str | None = None
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process, unless it runs; it imports MLflow while the caller goes on."""
        if self.process is not None:
            return
        command = [sys.executable, "-m", "wrapq.tracking.serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def open(self, name: str, tags: Mapping[str, str], run_id: str | None = None) -> None:
        """Open the store and create the run, or open `run_id` again; raises `TrackingError`."""
        # the address may hold a password: it goes through the pipe, not on the command line, which all can read
        where = {"uri": self.uri, "experiment": self.experiment, "outputs": str(self.outputs)}
        opened = self.call("open", name=name, tags=dict(tags), run_id=run_id, **where)
        self.run_id, self.run_url = opened["run_id"], opened["run_url"]

    def call(self, method: str, **arguments: Any) -> Any:
        """Call `method` of the store and wait for its end.

        Raises:
            TrackingError: the call failed there, or the process is gone.
        """
        if self.process is None or self.process.stdin is None or self.process.stdout is None:
            raise TrackingError("the tracking process has not been started")
        try:
            self.process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except (BrokenPipeError, ValueError):
            answer = ""
        if not answer:
            raise TrackingError(f"the tracking process ended early (status {self.process.poll()})")
        said = json.loads(answer)
        if "error" in said:
            raise TrackingError(said["error"])
        return said["result"]

    def close(self) -> None:
        """Let the process end; one that has no run open has nothing left to do and is not waited for."""
        if self.process is None or self.process.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        if self.run_id is None:
            self.process.kill()
            self.process.wait()
