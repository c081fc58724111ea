"""The folder of a run: created before anything is loaded, every file in it whole or absent."""

from __future__ import annotations

import errno
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

from wrapq.errors import OutputError

STATUS_FILE = "run.json"
SCRATCH = ".activations-"
"""How the names of folders begin that hold what is not in memory for the moment."""
_SPARE = 16 * 2**20
_FILE_MODE = 0o666


class RunFolder:
    """`outputs/<recipe>/<time>/`.

    Args:
        path: the folder, which exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, outputs: Path, recipe: str, needed_bytes: int) -> RunFolder:
        """A new folder for a run of `recipe`; raises `OutputError` when it cannot be made or its disk is too small."""
        parent = outputs.expanduser() / recipe
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path = next(path for i in range(1, 1000) if _make(path := parent / (stamp if i == 1 else f"{stamp}-{i}")))
            probe = path / ".probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise OutputError(
                f"cannot write runs to {parent}: {error.strerror}; choose another with paths.outputs=FOLDER"
            ) from error
        free = shutil.disk_usage(path).free
        if free < needed_bytes + _SPARE:
            path.rmdir()
            raise OutputError(
                f"the disk of {parent} has {free / 2**20:.0f} MiB free, and the quantized model needs about "
                f"{needed_bytes / 2**20:.0f} MiB; free some, or choose another with paths.outputs=FOLDER"
            )
        return cls(path)

    def write(self, name: str, save: Callable[[Path], object]) -> Path:
        """Let `save` write the file `name` under another name first, so that it is never there half written.

        Raises:
            OutputError: the disk is full or the folder not writable; nothing is left behind.
        """
        target, partial = self.path / name, self.path / f".{name}.partial"
        with self._guarded(target, partial):
            save(partial)
            partial.chmod(self.path.stat().st_mode & _FILE_MODE)  # safetensors lets nobody else read its files
            os.replace(partial, target)
        return target

    def write_files(self, save: Callable[[Path], object]) -> None:
        """Let `save` fill another folder first with files that then come here together; see `write`."""
        partial = self.path / ".files.partial"
        with self._guarded(self.path, partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            save(partial)
            for file in sorted(partial.iterdir()):
                os.replace(file, self.path / file.name)
            partial.rmdir()

    @contextmanager
    def all_or_none(self, *names: str) -> Iterator[None]:
        """Remove the files `names` again when what goes on meanwhile fails: only together do they mean anything."""
        try:
            yield
        except BaseException:
            for name in names:
                (self.path / name).unlink(missing_ok=True)
            raise

    @contextmanager
    def _guarded(self, target: Path, partial: Path) -> Iterator[None]:
        """Leave nothing of `partial` behind when writing `target` fails, and say so when the disk is the reason."""
        try:
            yield
        except BaseException as error:
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)
            if isinstance(error, Exception) and (reason := _disk_reason(error)):
                raise OutputError(f"cannot write {target}: {reason}") from error
            raise

    def sweep(self) -> None:
        """Remove what a process that was killed left half written; it is the only one that wrote here."""
        for left in (*self.path.glob(".*.partial"), *self.path.glob(f"{SCRATCH}*")):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()

    def write_text(self, name: str, text: str) -> Path:
        """Write `text` as the file `name`; see `write`."""
        return self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write_status(self, status: str, **facts: Any) -> Path:
        """Say in `run.json` how the run stands."""
        return self.write_text(STATUS_FILE, json.dumps({"status": status, **facts}, indent=2, default=str) + "\n")

    @contextmanager
    def log(self) -> Iterator[None]:
        """Keep what the program logs meanwhile in `log.txt`."""
        handler = logging.FileHandler(self.path / "log.txt", encoding="utf-8", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        logger = logging.getLogger("wrapq")
        level, before = logging.INFO, logger.level
        logger.addHandler(handler)
        logger.setLevel(level)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)
            handler.close()


def _make(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def _disk_reason(error: Exception) -> str | None:
    """What to say of an error of the disk; None for any other. safetensors words its own, with the system's number."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := re.search(r"os error (\d+)", str(error))):
        number = int(match[1])
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO):
        return os.strerror(number)
    return None
