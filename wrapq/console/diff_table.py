"""Differences as tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from wrapq.console.plain_table import plain_table
from wrapq.engine.plan_diff import Differences, Side
from wrapq.metrics import megabytes
from wrapq.resolve.folding import fold


def difference_tables(before: Side, after: Side, found: Differences) -> Iterator[RenderableType]:
    """What differs, repeated blocks folded; a line that says so where nothing does."""
    if not found:
        yield Text(f"{before.name} and {after.name} do the same")
        return
    if found.points:
        yield _points(before, after, found)
    for title, changes in (("stages", found.stages), ("settings", found.settings), ("runs", found.runs)):
        if changes:
            heads = ["", before.name, after.name, *([""] if any(change.where for change in changes) else [])]
            yield plain_table(title, heads, ([c.what, c.before, c.after, c.where or None] for c in changes))
    yield _estimates(before, after)


def difference_json(before: Side, after: Side, found: Differences) -> dict[str, Any]:
    """The same for programs, without folding."""
    return {"before": before.name, "after": after.name, "equal": not found, **asdict(found)}


def _points(before: Side, after: Side, found: Differences) -> Table:
    prefix = before.plan.model.blocks if before.plan.model.blocks == after.plan.model.blocks else ""
    alike = lambda c: (c.type, c.point, c.before, c.after)  # noqa: E731
    rows = [
        [name, change.type, change.point, change.before, change.after]
        for name, (change, *_) in fold(found.points, prefix, lambda change: change.module, alike)
    ]
    return plain_table("points", ["module", "type", "point", before.name, after.name], rows)


def _estimates(before: Side, after: Side) -> Text:
    sizes = " -> ".join(megabytes(side.plan.estimate.quantized_bytes) for side in (before, after))
    bits = [side.plan.estimate.bits_per_weight for side in (before, after)]
    shown = " -> ".join("none" if value is None else f"{value:.2f}" for value in bits)
    return Text(f"size {sizes}, bits per quantized weight {shown}")
