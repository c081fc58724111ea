"""The outbox of a run: every record on disk before it is sent, and how many the store has taken.

The folder `outbox/` of a run holds `events.jsonl`, one event a line and only ever appended to, and `sent.json`, which
says how far two lanes got: `record` (parameters, tags, metrics, status) and `files` (artifacts), each in order, so
that a full disk behind the artifacts does not hold up the numbers. Sending an event twice changes nothing in the store,
so whoever dies between sending and writing that down only causes a repetition.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from wrapq.ownership import own

FOLDER, EVENTS, SENT, LOCK, RESERVE = "outbox", "events.jsonl", "sent.json", "lock", "reserve"
RESERVED = 1 << 16  # bytes set aside for the last records of a run that filled its disk
Lane = Literal["record", "files"]
FILE_METHODS = frozenset({"artifact", "text", "register"})
OPEN, FINISH, REOPEN = "open", "finish", "reopen"
PARENT, SWEEP = "mlflow.parentRunId", "sweep_folder"
"""Tags of a sweep's job: the id of the sweep's MLflow run, and the sweep's folder."""


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """One call on the store: `method` of `MLflowStore`, for the run that is open."""

    method: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def lane(self) -> Lane:
        """The lane that the event is sent in."""
        return "files" if self.method in FILE_METHODS else "record"


@dataclass
class Sent:
    """How far the events of an outbox got.

    Attributes:
        state: `waiting` before the first try, `open`, `away` (cannot be reached now) or `refused`.
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
    """The outbox of the run in `folder`, which exists; the run's process appends, one other process sends."""

    def __init__(self, folder: Path) -> None:
        self.run_folder = Path(folder).resolve()
        self.path = self.run_folder / FOLDER
        self.events = self.path / EVENTS

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.events.is_file()

    def append(self, event: Event) -> None:
        """Append an event; raises `OSError` when that is not possible."""
        self.path.mkdir(exist_ok=True)
        line = json.dumps({"method": event.method, "arguments": event.arguments}) + "\n"

        def write() -> None:
            with self.events.open("ab") as file:
                file.write(line.encode())

        if event.method == OPEN:
            with contextlib.suppress(OSError):
                (self.path / RESERVE).write_bytes(bytes(RESERVED))
        self._with_room(write, self.drop_partial_line)
        if event.method == FINISH:
            (self.path / RESERVE).unlink(missing_ok=True)

    def drop_partial_line(self) -> None:
        """Remove an incomplete last line, which a process that died leaves."""
        if self.exists():
            whole = self.events.read_bytes().rpartition(b"\n")
            os.truncate(self.events, len(whole[0]) + len(whole[1]))

    def read(self, offset: int = 0) -> Iterator[tuple[Event, int]]:
        """The complete events from byte `offset` on, each with the offset of its end; damaged ones are left out."""
        if not self.exists():
            return
        with self.events.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):  # is being written just now
                    return
                offset += len(line)
                try:
                    event = Event(**json.loads(line))
                except (ValueError, TypeError):
                    _log.warning("%s: the record before byte %d is damaged: left out", self.events, offset)
                    continue
                yield event, offset

    def opening(self) -> dict[str, Any]:
        """The arguments of the first event: the name of the run and its store; nothing where it is incomplete."""
        return next((event.arguments for event, _ in self.read() if event.method == OPEN), {})

    def tags(self) -> dict[str, str]:
        """The tags that the run was opened with; none where its first event is incomplete."""
        return self.opening().get("tags", {})

    def parent(self) -> str | None:
        """The id of the parent run of a sweep's job, where the store does not link the two yet."""
        folder = None if self.sent().linked else self.tags().get(SWEEP)
        return None if folder is None else Outbox(Path(folder)).sent().run_id

    def finished(self) -> bool:
        """Whether the last event on the run's status is its end."""
        changes = [event.method for event, _ in self.read() if event.method in (OPEN, REOPEN, FINISH)]
        return changes[-1:] == [FINISH]

    def count(self) -> int:
        """The number of events."""
        return sum(1 for _ in self.read())

    def sent(self) -> Sent:
        """How far the events were sent; where that is damaged, they are sent again to the run that has their key."""
        try:
            state = json.loads((self.path / SENT).read_text(encoding="utf-8"))
            return Sent(**{key: value for key, value in state.items() if key in Sent.__dataclass_fields__})
        except FileNotFoundError:
            return Sent()
        except (OSError, ValueError, AttributeError):
            return Sent(tried=True)

    def write_sent(self, sent: Sent) -> None:
        """Record how far the events were sent."""
        self.path.mkdir(exist_ok=True)
        partial = self.path / f".{SENT}.partial"
        try:
            self._with_room(lambda: partial.write_text(json.dumps(asdict(sent)), encoding="utf-8"))
            os.replace(partial, self.path / SENT)
        finally:
            partial.unlink(missing_ok=True)

    def _with_room(self, write: Callable[[], object], mend: Callable[[], object] = lambda: None) -> None:
        """Run `write`; where the disk is full, `mend` and run it again in the space that was set aside."""
        try:
            write()
        except OSError:
            (self.path / RESERVE).unlink(missing_ok=True)
            mend()
            write()

    @contextlib.contextmanager
    def owned(self, seconds: float = 0.0) -> Iterator[None]:
        """Own the outbox for sending, after waiting at most `seconds`; raises `InUseError`."""
        with own(self.path / LOCK, f"the outbox of {self.run_folder}", seconds):
            yield

    def close_abandoned(self) -> None:
        """Close a run whose process died, as killed at the time of its last event."""
        when = int(self.events.stat().st_mtime * 1000)
        reason = "the process of the run ended without a word"
        self.drop_partial_line()
        self.append(Event("tags", {"values": {"failure": reason}}))
        self.append(Event(FINISH, {"status": "KILLED", "time": when}))
