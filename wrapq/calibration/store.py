"""A store of statistics on disk, shared by runs and by processes.

An entry is a safetensors file named by its key, the SHA-256 of everything that its content depends on, and by the
SHA-256 of its own bytes, so that flipped bytes and truncation are noticed; such an entry is removed and counts as
missing. Entries are written under another name and moved into place: a reader sees a whole one or none, and two
processes that write the same entry write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO

from filelock import FileLock
from safetensors.torch import load, save
from torch import Tensor

from wrapq.errors import OutputError

_LARGEST_HEADER = 100_000_000  # the format's own limit
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
            with self.path.open("rb") as file:
                return _facts(file)
        except (OSError, ValueError):
            return {}


@dataclass(frozen=True)
class Stored:
    """What an entry holds: tensors, and facts about them."""

    tensors: dict[str, Tensor]
    facts: dict[str, str]


class Store:
    """A folder of entries, the least recently used of which go when there are too many bytes.

    Args:
        folder: made at the first `put`.
        limit: bytes of all entries together.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = Path(folder), limit

    def get(self, key: str) -> Stored | None:
        """The entry called `key`, or None; one that was damaged is removed and named in the log."""
        for path in (self.folder / key[:2]).glob(f"{key}.*.safetensors"):
            try:
                data = path.read_bytes()
                os.utime(path)  # the last use decides what is collected
            except OSError:  # another process collected it
                continue
            if hashlib.sha256(data).hexdigest() != path.name.split(".")[1]:
                _log.warning("%s is damaged: removed, what it held is gathered again", path)
                path.unlink(missing_ok=True)
                continue
            return Stored(load(data), _facts(BytesIO(data)))
        return None

    def put(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> int:
        """Write an entry; returns its bytes.

        Raises:
            OutputError: the folder cannot be written or its disk is full; no part of the entry is left.
        """
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, dict(facts))
        folder = self.folder / key[:2]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                try:
                    file.write(data)
                    file.flush()
                    os.replace(file.name, folder / f"{key}.{hashlib.sha256(data).hexdigest()}.safetensors")
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise OutputError(f"cannot keep statistics in {self.folder}: {error.strerror}") from error
        return len(data)

    def entries(self) -> Iterator[Entry]:
        """All entries, in no order."""
        for path in self.folder.glob("*/*.safetensors"):
            with suppress(FileNotFoundError):  # another process collected it
                yield Entry(path, path.stat().st_size, path.stat().st_mtime)

    def collect(self, limit: float | None = None) -> tuple[int, int]:
        """Remove the least recently used entries beyond `limit` bytes, the store's own if None: their number, bytes."""
        if not self.folder.is_dir():
            return 0, 0
        with FileLock(self.folder / ".lock"):
            entries = sorted(self.entries(), key=lambda entry: entry.used)
            excess = sum(entry.size for entry in entries) - (self.limit if limit is None else limit)
            removed = freed = 0
            for entry in entries:
                if freed >= excess:
                    break
                entry.path.unlink(missing_ok=True)
                removed, freed = removed + 1, freed + entry.size
        return removed, freed


def _facts(file: IO[bytes]) -> dict[str, str]:
    """The metadata of a safetensors file, whose first 8 bytes are the length of the JSON header that follows."""
    length = int.from_bytes(file.read(8), "little")
    if length > _LARGEST_HEADER:
        raise ValueError("no safetensors file")
    return json.loads(file.read(length)).get("__metadata__", {})
