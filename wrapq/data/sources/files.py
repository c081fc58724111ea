"""Finding and opening local data files, with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from wrapq.errors import CalibrationError, WrapqError, nearest
from wrapq.paths import expand

PROBE = 1 << 16  # bytes looked at by a check: enough to tell a blank file from text
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
    found = sorted(p for p in where.iterdir() if p.suffix in suffixes and p.is_file())
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
    """As `check_readable`, and refuse packed files, and nothing but white space; raises `CalibrationError`."""
    check_readable(files)
    for file in files:
        start = read_start(file)
        if packed := [kind for mark, kind in _PACKED.items() if start.startswith(mark)]:
            raise CalibrationError(f"data file '{file}' is a {packed[0]} file: unpack it, and give what was in it")
    for file in files:
        if file.stat().st_size > PROBE or read_start(file).removeprefix(b"\xef\xbb\xbf").strip():
            return
    raise CalibrationError(f"data file '{files[0]}' holds no text, only white space")


def read_start(file: Path) -> bytes:
    """The first `PROBE` bytes of `file`; raises `CalibrationError` when it cannot be read."""
    try:
        with file.open("rb") as stream:
            return stream.read(PROBE)
    except OSError as error:
        raise CalibrationError(f"data file '{file}' cannot be read: {error.strerror}") from error


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of `file`, numbered from 1, without a byte order mark; raises `CalibrationError` where the file
    cannot be read, or one is not UTF-8."""
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except OSError as error:
        raise CalibrationError(f"data file '{file}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        what = f"byte 0x{error.object[error.start]:02x} at position {error.start} of the line"
        raise CalibrationError(
            f"data file '{file}', line {number}: not valid UTF-8 ({what}): save it as UTF-8"
        ) from None


def _neighbours(missing: Path) -> str:
    parent = missing.parent
    if not parent.is_dir():
        return f": the folder '{parent}' does not exist"
    names = nearest(missing.name, sorted(p.name for p in parent.iterdir()))
    return f"; in '{parent}' there is: {', '.join(names)}" if names else f": the folder '{parent}' is empty"
