"""The sending process of a run, as the run sees it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

from wrapq.tracking.outbox import Outbox

DRAIN_SECONDS = 120.0  # without any progress, after which the run no longer waits for what is still to be sent
AWAY_SECONDS = 3.0  # likewise, where the store is known to be away


class Sender:
    """Runs `wrapq.tracking.serve`; all that the two say to each other is in the outbox."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def prepare(self) -> None:
        """Start the process, unless it runs; it imports MLflow while the caller goes on."""
        if self.process is None:
            command = [sys.executable, "-m", "wrapq.tracking.serve"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    def follow(self, outbox: Outbox, uri: str, experiment: str, outputs: Path) -> None:
        """Let the process send what `outbox` holds and will hold."""
        self.prepare()
        # the address may hold a password: it goes through the pipe, not on the command line, which all can read
        where = {"folder": str(outbox.run_folder), "uri": uri, "experiment": experiment, "outputs": str(outputs)}
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.write(json.dumps(where) + "\n")
                self.process.stdin.flush()

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        return self.process is None or self.process.poll() is not None

    def drop(self) -> None:
        """End the process, which was given nothing to send."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()

    def drain(self, outbox: Outbox) -> None:
        """Let the process send what is left, as long as the store takes it; the rest stays in the outbox."""
        if self.process is None or self.process.stdin is None:
            return
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        seen, since = None, time.monotonic()
        while self.process.poll() is None:
            sent = outbox.sent()
            if (sent.record, sent.files) != seen:
                seen, since = (sent.record, sent.files), time.monotonic()
            if time.monotonic() - since > (AWAY_SECONDS if sent.state == "away" else DRAIN_SECONDS):
                self.process.kill()  # whatever it was doing, the outbox knows what is done
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)
