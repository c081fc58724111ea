"""How a run tells what it is doing; the command line shows it, a library call is silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Says nothing; the base of those that do."""

    @contextmanager
    def task(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[], None]]:
        """A piece of work of `total` steps; the caller calls what it is given after each."""
        yield lambda: None

    def note(self, text: str) -> None:
        """Something that a reader of the run should know."""
