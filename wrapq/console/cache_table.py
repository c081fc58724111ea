"""The statistics that runs share, on a terminal."""

from __future__ import annotations

from datetime import datetime

from rich.table import Table

from wrapq.metrics import megabytes
from wrapq.statistics.store import Store


def cache_table(store: Store) -> Table:
    """What the store holds, a row for each kind of statistic."""
    entries = sorted(store.entries(), key=lambda entry: entry.used)
    total = sum(entry.size for entry in entries)
    title = f"{store.folder}: {megabytes(total)} of at most {store.limit / 1e9:g} GB"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for column in ("statistic", "entries", "size", "seconds to gather", "last used"):
        table.add_column(column, justify="left" if column == "statistic" else "right")
    rows: dict[str, tuple[int, int, float, float]] = {}
    for entry in entries:
        facts = entry.facts()
        kind = facts.get("kind", "damaged")
        count, size, seconds, _ = rows.get(kind, (0, 0, 0.0, 0.0))
        rows[kind] = count + 1, size + entry.size, seconds + float(facts.get("seconds", 0)), entry.used
    for kind, (count, size, seconds, used) in rows.items():
        when = datetime.fromtimestamp(used).strftime("%Y-%m-%d %H:%M")
        table.add_row(kind, str(count), megabytes(size), f"{seconds:.1f}", when)
    return table
