"""The folder of a run: created before anything is loaded, every file in it whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy

from wrapq.errors import OutputError
from wrapq.foreign import LogFormatter
from wrapq.ownership import own
from wrapq.resolve.stored import MANIFEST

STATUS_FILE, RECIPE, PLAN, LOCK = "run.json", "recipe.yaml", "plan.json", "recipe.lock.yaml"
WEIGHTS = "model.safetensors"
MODULES, HISTOGRAMS = "modules.json", "histograms.json"
QPARAMS, STATISTICS = "qparams.safetensors", "statistics.safetensors"
KERNELS_FILE, REPORT, LOG = "kernels.txt", "report.html", "log.txt"
RECORDED = (REPORT, RECIPE, PLAN, LOCK, MANIFEST, MODULES, HISTOGRAMS, QPARAMS, STATISTICS, KERNELS_FILE, LOG)
"""The files that are sent to the tracked run, in this order."""
PROGRESS, STATE, STATE_BEFORE = "resume", "state.json", "state-before.json"
"""The folder that an unfinished run is resumed from, the file in it that says how, and the one of the block before."""
RUNNING, FINISHED, FAILED = "RUNNING", "FINISHED", "FAILED"
"""The states of a run, in `run.json`."""
SCRATCH = ".activations-"
"""Prefix of the folders that hold offloaded activations."""
_SPARE = 16 * 2**20
_FILE_MODE = 0o666
_OTHER = "choose another with paths.outputs=FOLDER"


class RunFolder:
    """The folder of a run, `outputs/<recipe>/<time>/`, which exists."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, outputs: Path, recipe: str, needed_bytes: int) -> RunFolder:
        """A new folder for a run of `recipe`; raises `OutputError` when it cannot be made or its disk is too small."""
        parent = outputs.expanduser() / recipe
        check_room(parent, needed_bytes)
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path = next(path for i in range(1, 1000) if _make(path := parent / (stamp if i == 1 else f"{stamp}-{i}")))
            probe = path / ".probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise OutputError(f"cannot write runs to {parent}: {error.strerror}; {_OTHER}") from error
        return cls(path)

    def own(self) -> AcquireReturnProxy:
        """Keep other processes out of the run; see `wrapq.ownership.own`."""
        return own(self.path / PROGRESS / "lock", f"the run {self.path}")

    def write(self, name: str, save: Callable[[Path], object], flushed: bool = True) -> Path:
        """Write the file `name` by `save`, under a temporary name first, so that it is never half written, even where
        the machine stops unless it is not `flushed` to the disk; what else has that name is removed.

        Raises:
            OutputError: the disk is full or the folder not writable; nothing is left behind.
        """
        target, partial = self.path / name, self.path / f".{name}.partial"
        with self._guarded(target, partial):
            save(partial)
            partial.chmod(self.path.stat().st_mode & _FILE_MODE)  # safetensors lets nobody else read its files
            if target.is_dir():
                shutil.rmtree(target)
            if flushed:
                flush(partial)
            os.replace(partial, target)
            if flushed:
                flush(self.path)
        return target

    def write_files(self, save: Callable[[Path], object]) -> list[str]:
        """Write several files by `save` into a temporary folder, then move all of them here; see `write`.

        Returns: their names.
        """
        partial = self.path / ".files.partial"
        with self._guarded(self.path, partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            save(partial)
            names = sorted(file.name for file in partial.iterdir())
            for name in names:
                os.replace(partial / name, self.path / name)
            partial.rmdir()
        return names

    @contextmanager
    def all_or_none(self, *names: str) -> Iterator[None]:
        """Remove the files `names` when an error is raised in the context: they are valid only together."""
        try:
            yield
        except BaseException:
            for name in names:
                (self.path / name).unlink(missing_ok=True)
            raise

    @contextmanager
    def _guarded(self, target: Path, partial: Path) -> Iterator[None]:
        """Remove `partial` when writing `target` fails; a full or read-only disk becomes an `OutputError`."""
        try:
            yield
        except BaseException as error:
            remove(partial)
            if isinstance(error, Exception) and (reason := _disk_reason(error)):
                raise OutputError(f"cannot write {target}: {reason}") from error
            raise

    def sweep(self) -> None:
        """Remove what a killed process left half written; to be called when no other process writes here."""
        for path in (*self.path.glob(".*.partial"), *self.path.glob(f"{SCRATCH}*")):
            remove(path)

    def write_text(self, name: str, text: str) -> Path:
        """Write `text` as the file `name`; see `write`."""
        return self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write_status(self, status: str, **facts: Any) -> Path:
        """Write `run.json`: the state of the run, and `facts`."""
        return self.write_text(STATUS_FILE, json.dumps({"status": status, **facts}, indent=2, default=str) + "\n")

    @contextmanager
    def log(self) -> Iterator[None]:
        """Log to `log.txt` within the context."""
        handler = logging.FileHandler(self.path / LOG, encoding="utf-8", delay=True)
        handler.setFormatter(LogFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        logger = logging.getLogger("wrapq")
        before = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)
            handler.close()


def seal(text: str) -> str:
    """`text` with its digest, as JSON."""
    return json.dumps({"digest": hashlib.sha256(text.encode()).hexdigest(), "text": text})


def unseal(sealed: str) -> str:
    """The text that was given to `seal`; raises `ValueError` where it is not what was written."""
    try:
        text: str = json.loads(sealed)["text"]
        if seal(text) == sealed:
            return text
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("nothing that was sealed") from error
    raise ValueError("its digest is another")


def remove(path: Path) -> None:
    """Remove what is there, file or folder; of a link the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the disk has what was written into a file or folder."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no such thing
            raise
    finally:
        os.close(descriptor)


def check_room(folder: Path, needed_bytes: int, what: str = "the quantized model", remedy: str = _OTHER) -> None:
    """Raise `OutputError` where `what` cannot be written to `folder`, which need not exist, or the disk has less than
    `needed_bytes`; nothing is written."""
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        reason = f"{there} is a file"
        if there.is_dir():
            may = os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
            reason = "" if may else f"{there} is not writable"
        total, _, free = shutil.disk_usage(there)
    except (OSError, ValueError) as error:  # a working directory that is gone, a NUL
        raise OutputError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}; {remedy}") from error
    if reason:
        raise OutputError(f"cannot write {folder}: {reason}; {remedy}")
    if total and free < needed_bytes + _SPARE:  # some file systems do not say
        raise OutputError(
            f"the disk of {folder} has {free / 2**20:.0f} MiB free, and {what} needs about "
            f"{needed_bytes / 2**20:.0f} MiB; free some, or {remedy}"
        )


def _make(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def _disk_reason(error: Exception) -> str | None:
    """The reason in words when the disk caused `error`, else None; safetensors gives the system number in a text."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := re.search(r"os error (\d+)", str(error))):
        number = int(match[1])
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO):
        return os.strerror(number)
    return None
