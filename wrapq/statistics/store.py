"""A store of statistics on disk, shared by runs and by processes.

An entry is a safetensors file named by its key, the SHA-256 of everything that its content depends on, and by the
SHA-256 of its own bytes, so that flipped bytes and truncation are noticed; such an entry is removed and counts as
missing. Entries are written under another name and moved into place: a reader sees a whole one or none, and two
processes that write the same entry write the same bytes. Whoever may write in the store's folder may write and remove
what others put there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from wrapq.errors import OutputError

_PATIENCE = 60
"""Seconds to wait for another process that removes entries."""
_ABANDONED = 3600
"""Seconds after which what is half written is of a process that was killed."""
_NAME = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}\.[0-9a-f]{64}\.safetensors")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One entry: its file, its bytes, and when it was last used, in seconds since the epoch."""

    path: Path
    size: int
    used: float

    def facts(self) -> dict[str, str]:
        """What it says of itself; nothing when it is damaged or was collected meanwhile."""
        try:
            with safe_open(self.path, "pt") as file:
                facts = file.metadata() or {}
            float(facts.get("seconds", 0))
            return facts
        except (OSError, SafetensorError, ValueError):
            return {}


@dataclass(frozen=True)
class Stored:
    """What an entry holds: tensors, and facts about them."""

    tensors: dict[str, Tensor]
    facts: dict[str, str]


class Store:
    """A `folder` of entries, made at the first `put`, the least recently used of which go when together they have more
    bytes than `limit`; nothing else that is in the folder."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = Path(folder), limit

    def get(self, key: str) -> Stored | None:
        """The entry called `key`, or None; one that was damaged is removed, where it may be, and named in the log."""
        for path in self._glob(f"{key[:2]}/{key}.*.safetensors"):
            try:
                data = path.read_bytes() if path.is_file() else b""  # a pipe would never end
            except OSError:  # another process collected it, or it is another user's own
                continue
            with suppress(OSError):  # others may only read it
                os.utime(path)  # the last use decides what is collected
            try:
                if hashlib.sha256(data).hexdigest() == path.name.split(".")[1]:
                    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
                    return Stored(load(data), json.loads(header).get("__metadata__", {}))
            except SafetensorError:
                pass
            left = "removed, what it held is gathered again"
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                left = f"what it held is gathered again; it cannot be removed: {error.strerror}"
            _log.warning("%s is damaged: %s", path, left)
        return None

    def put(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> int:
        """Write an entry; returns its bytes. Raises `OutputError`, and leaves no part of it, when the folder cannot be
        written or its disk is full."""
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, dict(facts))
        folder = self.folder / key[:2]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            folder.mkdir(exist_ok=True)
            with suppress(PermissionError):  # another user made it
                folder.chmod(self._mode())
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                try:
                    file.write(data)
                    file.flush()
                    os.chmod(file.name, self._mode() & 0o666)
                    os.replace(file.name, folder / f"{key}.{hashlib.sha256(data).hexdigest()}.safetensors")
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise OutputError(f"cannot keep statistics in {self.folder}: {error.strerror}") from error
        return len(data)

    def entries(self) -> Iterator[Entry]:
        """All entries, in no order."""
        for path in self._glob("*/*.safetensors"):
            if not _NAME.fullmatch(f"{path.parent.name}/{path.name}") or not path.is_file():
                continue  # no file of a store: somebody's model, or a pipe, which never ends
            with suppress(OSError):  # another process collected it
                yield Entry(path, path.stat().st_size, path.stat().st_mtime)

    def collect(self, limit: float | None = None) -> tuple[int, int]:
        """Remove the least recently used entries beyond `limit` bytes, the store's own if None: their number, bytes.

        Raises `OutputError` when they cannot be removed."""
        for left in self._glob("[0-9a-f][0-9a-f]/tmp????????"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    left.unlink()
        limit = self.limit if limit is None else limit
        removed = freed = 0
        if sum(entry.size for entry in self.entries()) <= limit:
            return removed, freed
        try:
            with FileLock(self.folder / ".lock", timeout=_PATIENCE, mode=self._mode() & 0o666 | 0o600):
                entries = sorted(self.entries(), key=lambda entry: entry.used)
                excess = sum(entry.size for entry in entries) - limit
                for entry in entries:
                    if freed >= excess:
                        break
                    entry.path.unlink(missing_ok=True)
                    removed, freed = removed + 1, freed + entry.size
        except OSError as error:
            raise OutputError(f"cannot remove statistics from {self.folder}: {error.strerror or error}") from error
        return removed, freed

    def _glob(self, pattern: str) -> list[Path]:
        """The paths that match `pattern`; none in folders that may not be read."""
        return [self.folder / name for name in glob(pattern, root_dir=self.folder)]

    def _mode(self) -> int:
        """The rights of the store's folder, which are those of all that is in it."""
        return stat.S_IMODE(self.folder.stat().st_mode)
