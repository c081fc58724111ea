"""Folders in which one process at a time may write."""

from __future__ import annotations

import contextlib
import os
import socket
from datetime import datetime
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from wrapq.errors import OutputError


class InUseError(OutputError):
    """A folder in which another process writes."""


def own(path: Path, what: str, seconds: float = 0.0) -> AcquireReturnProxy:
    """Lock the file `path`, in a new folder if need be, until what is returned is left as a context, its `lock` is
    released, or this process dies, however it dies. A file beside it says who has the lock.

    Raises:
        InUseError: another process, or another thread of this one, still has it after `seconds`; told which of `what`.
        OutputError: the folder cannot be written.
    """
    lock, holder = FileLock(path), path.with_name(f"{path.name}.holder")
    try:
        path.parent.mkdir(exist_ok=True)
        owner = lock.acquire(timeout=seconds)
    except Timeout:
        told = "another process"
        with contextlib.suppress(OSError, ValueError):
            told = holder.read_text(encoding="utf-8")
        raise InUseError(f"{what} is in use by {told}") from None
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since}", encoding="utf-8")
    return owner
