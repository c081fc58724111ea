"""What a run wants recorded, on disk before anything else sees it, and how much of it the store has taken.

The folder `outbox/` of a run holds `events.jsonl`, one event a line and only ever appended to, and `sent.json`, which
says how far two lanes got: `record` (parameters, tags, metrics, status) and `files` (artifacts), each in order, so
that a full disk behind the artifacts does not hold up the numbers. Sending an event twice changes nothing in the store,
so whoever dies between sending and writing that down only causes a repetition.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

FOLDER, EVENTS, SENT, LOCK, RESERVE = "outbox", "events.jsonl", "sent.json", "lock", "reserve"
RESERVED = 1 << 16  # bytes set aside for the last words of a run that filled its disk
Lane = Literal["record", "files"]
FILE_METHODS = frozenset({"artifact", "text", "register"})
OPEN, FINISH, REOPEN = "open", "finish", "reopen"
PARENT, SWEEP = "mlflow.parentRunId", "sweep_folder"
"""Tags of a sweep's job: the sweep's run, as MLflow has it, and the sweep's folder."""


@dataclass(frozen=True)
class Event:
    """One call on the store: `method` of `Store`, for the run that is open."""

    method: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def lane(self) -> Lane:
        """The lane in which the event waits."""
        return "files" if self.method in FILE_METHODS else "record"


@dataclass
class Sent:
    """How far the events of an outbox got.

    Attributes:
        state: `waiting` before the first try, `open`, `away` (cannot be reached now) or `refused` (will not have it).
        reason: why, where the state is `away` or `refused`.
        tried: whether creating the run was tried, so that it may exist although no answer came.
        run_id: the run's id in the store, once it is known.
        uri: the store that has the run, without its secrets.
        run_url: its page on a tracking server.
        record: bytes of the events whose records were sent.
        files: bytes of the events whose files were sent.
        count: how many events were taken.
        linked: whether the store knows the sweep that the run is a job of, or there is none.
        rejected: events that the store will never take, with its reasons.
    """

    state: Literal["waiting", "open", "away", "refused"] = "waiting"
    reason: str = ""
    tried: bool = False
    run_id: str | None = None
    uri: str | None = None
    run_url: str | None = None
    record: int = 0
    files: int = 0
    count: int = 0
    linked: bool = False
    rejected: list[str] = field(default_factory=list)


class Outbox:
    """The outbox of one run; the run's process appends, one other process sends.

    Args:
        folder: the run's folder, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self.run_folder = Path(folder).resolve()
        self.path = self.run_folder / FOLDER
        self.events = self.path / EVENTS

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.events.is_file()

    def append(self, event: Event) -> None:
        """Write an event down; raises `OSError` when that is not possible."""
        self.path.mkdir(exist_ok=True)
        line = json.dumps({"method": event.method, "arguments": event.arguments}, ensure_ascii=False) + "\n"

        def write() -> None:
            with self.events.open("ab") as file:
                file.write(line.encode())

        if event.method == OPEN:
            with contextlib.suppress(OSError):
                (self.path / RESERVE).write_bytes(bytes(RESERVED))
        self._with_room(write, self.mend)
        if event.method == FINISH:
            (self.path / RESERVE).unlink(missing_ok=True)

    def mend(self) -> None:
        """Take away the beginning of a line that a process which died left unfinished."""
        if self.exists():
            whole = self.events.read_bytes().rpartition(b"\n")
            os.truncate(self.events, len(whole[0]) + len(whole[1]))

    def read(self, offset: int = 0) -> Iterator[tuple[Event, int]]:
        """The whole events from byte `offset` on, each with the offset of its end."""
        if not self.exists():
            return
        with self.events.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):  # is being written just now
                    return
                offset += len(line)
                yield Event(**json.loads(line)), offset

    def opening(self) -> dict[str, Any]:
        """The arguments of the first event, which say what the run is called and where it goes."""
        return next(self.read())[0].arguments

    def tags(self) -> dict[str, str]:
        """The tags that the run was begun with; none where its first event is not whole."""
        return next((event.arguments.get("tags", {}) for event, _ in self.read()), {})

    def parent(self) -> str | None:
        """The run of the sweep that this run is a job of, where the store does not know yet that it is."""
        folder = None if self.sent().linked else self.tags().get(SWEEP)
        return None if folder is None else Outbox(Path(folder)).sent().run_id

    def finished(self) -> bool:
        """Whether the last event about the run's status says that it ended."""
        said = [event.method for event, _ in self.read() if event.method in (OPEN, REOPEN, FINISH)]
        return bool(said) and said[-1] == FINISH

    def count(self) -> int:
        """How many events there are."""
        return sum(1 for _ in self.read())

    def sent(self) -> Sent:
        """How far the events got."""
        try:
            said = json.loads((self.path / SENT).read_text(encoding="utf-8"))
            return Sent(**{key: said[key] for key in Sent.__dataclass_fields__ if key in said})
        except FileNotFoundError:
            return Sent()

    def write_sent(self, sent: Sent) -> None:
        """Replace what is known of how far the events got."""
        self.path.mkdir(exist_ok=True)
        partial = self.path / f".{SENT}.partial"
        try:
            self._with_room(lambda: partial.write_text(json.dumps(asdict(sent)), encoding="utf-8"))
            os.replace(partial, self.path / SENT)
        finally:
            partial.unlink(missing_ok=True)

    def _with_room(self, write: Callable[[], object], mend: Callable[[], object] = lambda: None) -> None:
        """Let `write` run, and where the disk is full again in the room that was set aside, after `mend`."""
        try:
            write()
        except OSError:
            (self.path / RESERVE).unlink(missing_ok=True)
            mend()
            write()

    @contextlib.contextmanager
    def locked(self, seconds: float = 0.0) -> Iterator[bool]:
        """Hold the right to send, waiting for it at most `seconds`; gives whether it was got.

        Where the system has no file locks it is always given.
        """
        if os.name == "nt":
            yield True
            return
        import fcntl

        self.path.mkdir(exist_ok=True)
        end = time.monotonic() + seconds
        with (self.path / LOCK).open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= end:
                        yield False
                        return
                    time.sleep(0.05)
            yield True

    def close_for_the_dead(self) -> None:
        """End the record of a run whose process ended without doing so, at the time it was last heard of."""
        when = int(self.events.stat().st_mtime * 1000)
        reason = "the process of the run ended without a word"
        self.mend()
        self.append(Event("tags", {"values": {"failure": reason}}))
        self.append(Event(FINISH, {"status": "KILLED", "time": when}))
