"""Progress reporting: shown by the command line, silent in a library call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Silent; the base class of what shows progress."""

    @contextmanager
    def task(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[], None]]:
        """A task of `total` steps; yields what to call after each step."""
        yield lambda: None

    def note(self, text: str) -> None:
        """Show a note for the reader of the run."""
