"""The process that sends a run's outbox, as the run controls it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from wrapq.tracking.outbox import Outbox

DRAIN_SECONDS = 120.0  # without any progress, after which the run no longer waits for what is still to be sent
AWAY_SECONDS = 3.0  # likewise, where the store is known to be away


_shared: list[subprocess.Popen[str]] | None = None


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """All runs that are recorded meanwhile, beside and after each other, are sent by one process: to import MLflow for
    each takes longer than many a small run."""
    global _shared
    before, _shared = _shared, []
    try:
        yield
    finally:
        for process in _shared:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                process.communicate(timeout=AWAY_SECONDS)
            process.kill()  # whatever it was doing, the outboxes know what is done
            process.wait()
        _shared = before


class Sender:
    """Runs `wrapq.tracking.worker`; the two communicate through the outbox alone."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self._shared = _shared

    def prepare(self) -> None:
        """Start the process, unless it runs; it imports MLflow while the caller goes on."""
        if self.process is None and self._shared and self._shared[-1].poll() is None:
            self.process = self._shared[-1]
        if self.process is None:
            command = [sys.executable, "-m", "wrapq.tracking.worker"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            if self._shared is not None:
                self._shared.append(self.process)

    def follow(self, outbox: Outbox, uri: str, experiment: str, outputs: Path) -> None:
        """Make the process send the events of `outbox`, those to come included."""
        self.prepare()
        # the address may hold a password: it goes through the pipe, not on the command line, which all can read
        self._write(folder=str(outbox.run_folder), uri=uri, experiment=experiment, outputs=str(outputs))

    def _write(self, **what: str) -> None:
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.write(json.dumps(what) + "\n")
                self.process.stdin.flush()

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        return self.process is None or self.process.poll() is not None

    def drop(self) -> None:
        """Kill the process, which has nothing to send."""
        if self.process is not None and self._shared is None:
            self.process.kill()
            self.process.communicate()

    def drain(self, outbox: Outbox) -> None:
        """Wait while the process sends what is left; what the store does not take in time stays in the outbox."""
        if self.process is None or self.process.stdin is None:
            return
        if self._shared is not None:
            self._write(folder=str(outbox.run_folder))
        else:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        seen, since = None, time.monotonic()
        while self.process.poll() is None:
            sent = outbox.sent()
            if self._shared is not None and (sent.state == "refused" or sent.count >= outbox.count()):
                return  # nothing is left that the store might still take
            if (sent.record, sent.files) != seen:
                seen, since = (sent.record, sent.files), time.monotonic()
            if time.monotonic() - since > (AWAY_SECONDS if sent.state == "away" else DRAIN_SECONDS):
                if self._shared is not None:
                    return  # it goes on, and others with it
                self.process.kill()  # whatever it was doing, the outbox knows what is done
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)
