"""Runs side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from wrapq.console.plain_table import plain_table
from wrapq.engine.run_comparison import best, comparable, figures_of
from wrapq.metrics import KL
from wrapq.resolve.folding import fold
from wrapq.runs.run_record import RunRecord

_CURVE = "layer/relative_error"


def comparison_tables(records: Sequence[RunRecord]) -> Iterator[RenderableType]:
    """Figures, errors of blocks and errors of weights: a row each, a column for each run, the best marked `*`."""
    yield _figures(records)
    if len(comparable(records)) < len(figures_of(records)):
        yield Text("note: measured on different models or texts, so that none is best in quality", "yellow")
    if any(_CURVE in record.curves for record in records):
        yield _blocks(records)
    if any(record.weights for record in records):
        yield _weights(records)


def comparison_json(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The same for programs, without folding."""
    runs = [
        {
            "name": record.name,
            "folder": str(record.folder),
            "recipe": record.plan.recipe.name,
            "digests": record.lock.digests,
            "figures": record.figures,
            "stages": record.measured.stages,
            "seconds": record.measured.seconds,
            "curves": record.curves,
            "weights": record.weights,
        }
        for record in records
    ]
    marks = {name: value for name in comparable(records) if (value := best(records, name)) is not None}
    winners = {name: [r.name for r in records if r.figures.get(name) == value] for name, value in marks.items()}
    return {"runs": runs, "best": winners, "comparable": list(comparable(records))}


def _figures(records: Sequence[RunRecord]) -> Table:
    table = _table("runs", records)
    for metric in figures_of(records):
        mark = best(records, metric.name)
        cells = [_marked(record.figures.get(metric.name), metric.show, mark) for record in records]
        if any(cells):
            table.add_row(metric.name, *cells)
    return table


def _blocks(records: Sequence[RunRecord]) -> Table:
    """Where along the model each run loses."""
    table = _table("relative error of the output of each block", records)
    curves = (record.curves.get(_CURVE, ()) for record in records)
    for index, values in enumerate(itertools.zip_longest(*curves, fillvalue=math.nan)):
        table.add_row(str(index), *_cells(values, lower=True, records=records))
    return table


def _weights(records: Sequence[RunRecord]) -> Table:
    """The signal-to-noise ratio of every weight, that of the worst block where blocks are folded."""
    names = list(dict.fromkeys(name for record in records for name in record.weights))
    prefix = records[0].plan.model.blocks
    table = _table("least signal-to-noise ratio of weights, dB", records)
    for name, members in fold(names, prefix, lambda weight: weight, lambda weight: 0):
        values = []
        for record in records:
            reports = (record.weights.get(member, {}) for member in members)
            values.append(min((r["weight_sqnr_db"] for r in reports if "weight_sqnr_db" in r), default=math.nan))
        table.add_row(name, *_cells(values, lower=False, records=records, shown=".1f"))
    return table


def _cells(values: Sequence[float], lower: bool, records: Sequence[RunRecord], shown: str = ".3g") -> list[Text]:
    known = [value for value in values if not math.isnan(value)]
    mark = (min(known) if lower else max(known)) if len(set(known)) > 1 and KL in comparable(records) else None
    return [_marked(None if math.isnan(v) else v, lambda value: f"{value:{shown}}", mark) for v in values]


def _marked(value: float | None, show: Callable[[float], str], mark: float | None) -> Text:
    if value is None:
        return Text("")
    return Text(f"{show(value)} *", "bold green") if value == mark else Text(show(value))


def _table(title: str, records: Sequence[RunRecord]) -> Table:
    return plain_table(title, ["", *(record.name for record in records)])
