"""Finding and opening local data files, with errors that name the file."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from wrapq.errors import CalibrationError, WrapqError, nearest
from wrapq.paths import expand

PROBE = 1 << 16  # bytes looked at by a check: enough to tell a blank file from text
LINE = 1 << 28  # bytes that a line of a packed file may have
UNPACKED = 1 << 22  # bytes that a packed file may give before it has to be text, of which one byte
RATIO = 100  # gives at most so many: it is packed three to ten times, and what is no text up to a thousand
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def find_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """`path` itself, or when it is a folder its files with one of `suffixes`, sorted by name; `~` is the home folder.

    Raises:
        CalibrationError: nothing is there (with the nearest names of the folder), or the folder has no such file.
    """
    try:
        where = expand(path)
        there = where.exists()
    except (OSError, WrapqError) as error:  # the first of a path that is too long
        raise CalibrationError(f"data file {path[:80]!r} cannot be read: {error}") from None
    if not there:
        raise CalibrationError(f"data file {path!r} does not exist{_neighbours(where)}")
    if where.is_file():
        return [where]
    if not where.is_dir():
        raise CalibrationError(f"data file {path!r} is a device, a pipe or a socket: write what it gives to a file")
    found = sorted(p for p in where.iterdir() if p.name.endswith(suffixes) and p.is_file())
    if not found:
        raise CalibrationError(f"data folder {path!r} holds no file ending in {' or '.join(suffixes)}")
    return found


def check_readable(files: list[Path]) -> None:
    """Refuse files that cannot be opened, and a set of files that are all empty; raises `CalibrationError`."""
    for file in files:
        read_start(file)
    if not any(file.stat().st_size for file in files):
        raise CalibrationError(f"data file '{files[0]}' is empty")


def check_text(files: list[Path]) -> None:
    """As `check_readable`, and refuse what is packed otherwise than by gzip under a name that ends in `.gz`, and
    nothing but white space; raises `CalibrationError`."""
    check_readable(files)
    starts = [read_start(file) for file in files]
    for file, start in zip(files, starts, strict=True):
        if packed := [kind for mark, kind in _PACKED.items() if start.startswith(mark)]:
            remedy = ", or let its name end in .gz" if packed[0] == "gzip" else ""
            what = f"is a {packed[0]} file: unpack it, and give what was in it{remedy}"
            raise CalibrationError(f"data file '{file}' {what}")
    if not any(len(start) == PROBE or start.removeprefix(b"\xef\xbb\xbf").strip() for start in starts):
        raise CalibrationError(f"data file '{files[0]}' holds no text, only white space")


def read_start(file: Path) -> bytes:
    """The first `PROBE` bytes of `file`, unpacked; raises `CalibrationError` when it cannot be read."""
    with _opened(file) as (stream, _):
        return stream.read(PROBE)


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of `file`, unpacked, numbered from 1, without a byte order mark; raises `CalibrationError` where the
    file cannot be read, one is not UTF-8, or a packed file holds more than a text would."""
    total = 0
    with _opened(file) as (stream, raw):
        packed = stream is not raw
        for number, line in enumerate(iter(lambda: stream.readline(LINE + 1), b"") if packed else stream, start=1):
            total += len(line)
            if packed and (len(line) > LINE or (total > UNPACKED and total > RATIO * raw.tell())):
                what = f"out of {raw.tell():,} bytes come {total >> 20} MiB"
                raise CalibrationError(f"data file '{file}', line {number}: {what}: unpack it, and give what was in it")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                what = f"byte 0x{error.object[error.start]:02x} at position {error.start} of the line"
                raise CalibrationError(
                    f"data file '{file}', line {number}: not valid UTF-8 ({what}): save it as UTF-8"
                ) from None


@contextmanager
def _opened(file: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """What `file` holds, and the file as it is."""
    try:
        with file.open("rb") as raw:
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw)) if file.suffix == ".gz" else raw, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CalibrationError(f"data file '{file}' cannot be unpacked by gzip: {error}") from None
    except OSError as error:
        raise CalibrationError(f"data file '{file}' cannot be read: {error.strerror}") from error


def _neighbours(missing: Path) -> str:
    parent = missing.parent
    if not parent.is_dir():
        return f": the folder '{parent}' does not exist"
    names = nearest(missing.name, sorted(p.name for p in parent.iterdir()))
    return f"; in '{parent}' there is: {', '.join(names)}" if names else f": the folder '{parent}' is empty"
