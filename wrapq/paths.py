"""Paths as users write them, and what may lie at them."""

from __future__ import annotations

from pathlib import Path

from wrapq.errors import ModelError, WrapqError

_SHOWN = 80


def expand(path: str | Path) -> Path:
    """The path with the home folder for `~`, or somebody's for `~name`.

    Raises:
        WrapqError: there is no such home folder, or no path holds such a character.
    """
    try:
        if "\0" in str(path):
            raise RuntimeError("it holds a NUL byte")
        return Path(path).expanduser()
    except RuntimeError as error:
        raise WrapqError(f"no path: {str(path)[:_SHOWN]!r} ({error})") from None


def refuse_devices(folder: Path) -> None:
    """Raise `ModelError` where a file of `folder` is a device, a pipe or a socket: reading one may never end."""
    for path in folder.iterdir():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ModelError(f"{path} is no file, but a device, a pipe or a socket: nothing is read from it")
