"""Differences as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from wrapq.engine.difference import Change, Differences, Side
from wrapq.report.plan import megabytes
from wrapq.resolve.folding import fold


def difference_tables(before: Side, after: Side, found: Differences) -> Iterator[RenderableType]:
    """What differs, repeated blocks folded; a line that says so where nothing does."""
    if not found:
        yield Text(f"{before.name} and {after.name} do the same")
        return
    if found.points:
        yield _points(before, after, found)
    parts = (("stages", found.stages), ("settings", found.settings), ("runs", found.runs))
    for title, changes in parts:
        if changes:
            yield _changes(title, before, after, changes)
    yield _estimates(before, after)


def difference_json(before: Side, after: Side, found: Differences) -> dict[str, Any]:
    """The same for programs, without folding."""
    return {"before": before.name, "after": after.name, "equal": not found, **asdict(found)}


def _points(before: Side, after: Side, found: Differences) -> Table:
    table = _table("points", "module", "type", "point", before.name, after.name)
    prefix = before.plan.model.blocks if before.plan.model.blocks == after.plan.model.blocks else ""
    alike = lambda c: (c.type, c.point, c.before, c.after)  # noqa: E731
    for name, rows in fold(found.points, prefix, lambda change: change.module, alike):
        table.add_row(name, rows[0].type, rows[0].point, rows[0].before, rows[0].after)
    return table


def _changes(title: str, before: Side, after: Side, changes: Sequence[Change]) -> Table:
    table = _table(title, "", before.name, after.name, *([""] if any(change.where for change in changes) else []))
    for change in changes:
        table.add_row(change.what, change.before, change.after, change.where or None)
    return table


def _estimates(before: Side, after: Side) -> Text:
    sizes = " -> ".join(megabytes(side.plan.estimate.quantized_bytes) for side in (before, after))
    bits = [side.plan.estimate.bits_per_weight for side in (before, after)]
    shown = " -> ".join("none" if value is None else f"{value:.2f}" for value in bits)
    return Text(f"size {sizes}, bits per quantized weight {shown}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    return table
