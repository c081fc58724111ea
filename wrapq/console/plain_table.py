"""The look of tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text


def plain_table(title: str, heads: Iterable[str], rows: Iterable[Sequence[str | Text | None]] = ()) -> Table:
    """A table without lines, in whose columns long text goes on below."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
