"""Results, presets and progress on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from wrapq.engine.export import Exported
from wrapq.engine.progress import Progress
from wrapq.engine.run import RunResult
from wrapq.report.figures import goal_lines
from wrapq.report.plan import megabytes


class ConsoleProgress(Progress):
    """A bar with rate and remaining time for each piece of work, gone when it is done."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def task(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[], None]]:
        """See `Progress.task`."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        hidden = not self.console.is_terminal  # a log file would only collect empty lines
        with RichProgress(*columns, console=self.console, transient=True, disable=hidden) as bars:
            bar = bars.add_task(title, total=total)
            yield lambda: bars.advance(bar)

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        self.console.print(Text(f"note: {text}", "yellow"))


class _Rate(ProgressColumn):
    """Steps per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """The rate, once there is one."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self.unit}/s" if speed and self.unit else "", "dim")


def quality_table(stages: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int]) -> Table:
    """Float against quantized: a row for each stage that was measured."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", "perplexity", "change", "KL to float", "top-1 agreement", "size"):
        table.add_column(column, justify="left" if not column else "right")
    base = next(iter(stages.values()))["perplexity"]
    for stage, metrics in stages.items():
        change = f"{100 * (metrics['perplexity'] / base - 1):+.2f} %" if metrics["perplexity"] != base else ""
        kl = f"{metrics['kl']:z.5f}" if "kl" in metrics else ""
        top1 = f"{100 * metrics['top1_agreement']:.2f} %" if "top1_agreement" in metrics else ""
        size = megabytes(sizes[stage]) if stage in sizes else ""
        table.add_row(_TITLES.get(stage, stage), f"{metrics['perplexity']:.3f}", change, kl, top1, size)
    return table


_TITLES = {"weights": "weights quantized", "quantized": "all quantized"}


def show_result(console: Console, result: RunResult, tokens: int) -> None:
    """The end of `wrapq run`."""
    console.print(quality_table(result.metrics, result.sizes))
    for line in goal_lines(result.goals):
        console.print(line)
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in result.seconds.items() if name != "total")
    console.print(f"\nmeasured on {tokens:,} tokens; {result.seconds['total']:.1f} s in all: {seconds}")
    console.print(f"model and record: {result.folder}")
    console.print(f"to read: {result.folder / 'report.html'}")
    if result.kernels:
        console.print(f"kernels here: {result.kernels}")
    if result.run_id:
        console.print(f"MLflow run {result.run_id}: {result.run_url or 'wrapq ui shows it'}")
    console.print(f'load it: wrapq.load("{result.folder}")')
    if result.exported is not None:
        show_export(console, result.exported)


def show_export(console: Console, exported: Exported) -> None:
    """Where an export lies, and that it was checked."""
    console.print(f"export: {exported.path}, {megabytes(exported.size)} of weights")
    console.print(f"loaded by its own library in a fresh process: logits off by {exported.error:.1e} of their norm")
