"""A sweep on a terminal: a line for each job and a bar over all, then the table with its winner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from wrapq.engine.goals import COLLAPSED
from wrapq.metrics import KL, METRICS, SECONDS, SIZE, metric, metrics_of
from wrapq.sweep.driver import SweepProgress, SweepResult
from wrapq.sweep.job import FAILED, REUSED
from wrapq.sweep.table import SweepRow, SweepTable

_LINE = (KL, "perplexity_increase", SIZE, SECONDS)
_OF_EXPORTS = "export_token_ms"


class ConsoleSweep(SweepProgress):
    """A line for each job that ends, above a bar that is gone in the end."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: RichProgress | None = None

    @contextmanager
    def jobs(self, total: int) -> Iterator[None]:
        columns = (
            SpinnerColumn(),
            TextColumn("jobs", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        hidden = not self.console.is_terminal
        with RichProgress(*columns, console=self.console, transient=True, disable=hidden) as self._bars:
            self._bars.add_task("jobs", total=total)
            yield

    def begun(self, folder: Path, continued: bool) -> None:
        self.console.print(f"{'going on with' if continued else 'sweep'} {folder}", soft_wrap=True)

    def ended(self, row: SweepRow, total: int) -> None:
        title = " ".join(f"{key}={value}" for key, value in row.values.items())
        line = Text(f"{row.number:>{len(str(total))}}/{total}  {title}  ")
        if row.outcome.status == FAILED:
            line.append(f"failed: {row.outcome.reason}", "red")
        else:
            shown = {METRICS.get(name).label: METRICS.get(name).text(row.outcome.figures.get(name)) for name in _LINE}
            line.append(", ".join(f"{label} {text}" for label, text in shown.items()))
            if row.outcome.status == REUSED:
                line.append(f"  done before: {row.outcome.folder}", "dim")
        self.console.print(line, soft_wrap=True)
        if self._bars is not None:
            self._bars.advance(self._bars.task_ids[0])

    def interrupted(self, done: int, total: int) -> None:
        self.console.print(f"{done} of {total} jobs are done; the same command goes on from here")


def show_sweep(console: Console, result: SweepResult) -> None:
    """The end of `wrapq sweep`."""
    table = result.table
    console.print()
    console.print(_table(table))
    console.print()
    if table.winner is not None:
        title = " ".join(f"{key}={value}" for key, value in table.winner.values.items())
        console.print(Text.assemble(("winner", "bold green"), f": job {table.winner.number}, {title} ({table.rule()})"))
        console.print(f"its model: {table.winner.outcome.folder}", soft_wrap=True)
    else:
        why = "meets all goals" if table.has_goals else "left a model that works" if table.collapsed else "finished"
        console.print(Text(f"no winner: no job {why}"))
    if table.collapsed:
        jobs = ", ".join(str(row.number) for row in table.collapsed)
        why = "top-1 agreement under a half, or five times the perplexity"
        console.print(Text(f"{COLLAPSED}: job {jobs}: {why}", "bold red"))
    verdicts = [(name, v) for row in table.rows for name, v in row.outcome.goals.items() if not v.survival]
    for name, bound in sorted({(name, v.bound) for name, v in verdicts}):
        met = sum(v.met for which, v in verdicts if (which, v.bound) == (name, bound))
        console.print(f"goal {name}: {metric(name).bound(bound)}: met by {met} of {len(table.rows)} jobs")
    for row in table.failed:
        console.print(Text(f"job {row.number} failed: {row.outcome.reason}", "red"), soft_wrap=True)
    console.print(f"table and plot: {result.folder}", soft_wrap=True)
    if result.run_id:
        console.print(f"MLflow run {result.run_id}: {result.run_url or 'wrapq ui shows it'}", soft_wrap=True)
    for problem in result.problems:
        console.print(Text(f"note: {problem}", "yellow"))


def _table(table: SweepTable) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="dim")
    keys = dict.fromkeys(key for row in table.rows for key in row.values)
    decides = {*table.minimize, *(name for row in table.rows for name in row.outcome.goals), _OF_EXPORTS}
    found = metrics_of([row.outcome.figures for row in table.rows], decides)
    # a terminal has no room for all that is measured of exports; the page and the table's file have
    figures = [each for each in found if not each.exported or each.name in decides]
    for column in ("job", *keys):
        shown.add_column(column, overflow="fold")
    for each in figures:
        shown.add_column(each.label, justify="right", no_wrap=True)
    for column in ("goals", "Pareto", "")[0 if table.has_goals else 1 :]:
        shown.add_column(column, no_wrap=True)
    for row in table.rows:
        values = (each.text(row.outcome.figures.get(each.name)) for each in figures)
        goals = [("met" if row.meets_goals else "missed") if row.done else ""] if table.has_goals else []
        fronts = ", ".join(metric(name).label for name in row.fronts)
        mark = "winner" if row.winner else "failed" if row.outcome.status == FAILED else ""
        style = "bold green" if row.winner else "red" if mark else ""
        cells = [str(row.number), *(row.values.get(key, "") for key in keys), *values, *goals, fronts, mark]
        shown.add_row(*cells, style=style)
    return shown
