"""A verdict on a lock as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from wrapq.console.plain_table import plain_table
from wrapq.engine.replay import Difference, Verdict

_DIGITS = 16


def verdict_tables(name: str, verdict: Verdict) -> Iterator[RenderableType]:
    """The mode and why, what differs, and the verdict in its last line."""
    mode = "exact: device and libraries are those of the lock" if verdict.exact else "within bands"
    yield Text(f"mode {mode}")
    if verdict.surroundings:
        yield _table("surroundings that differ", verdict.surroundings)
    if not verdict.exact and verdict.metrics:
        rows = ([name, f"{expected:.6g}", f"{found:.6g}"] for name, (expected, found) in verdict.metrics.items())
        yield plain_table("metrics", ["", "lock", "here"], rows)
    if verdict.same:
        yield Text(f"{name}: verified, {verdict.checked}", "green")
        return
    yield _table("what differs, the first first", verdict.failures)
    first = verdict.failures[0]
    where = f" ({first.where})" if first.where else ""
    yield Text(f"{name}: differs, first in {first.what}{where}; compared were {verdict.checked}", "red")


def _table(title: str, rows: Sequence[Difference]) -> Table:
    cells = ([row.what, _short(row.expected), _short(row.found), row.where] for row in rows)
    return plain_table(title, ["", "lock", "here", "where"], cells)


def _short(text: str) -> str:
    return text[:_DIGITS] if len(text) == 64 else text  # digests
