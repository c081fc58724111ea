"""Results, presets and progress on a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich import progress as rich
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wrapq.engine.export import Exported
from wrapq.engine.goals import COLLAPSED, GoalVerdict
from wrapq.engine.progress import Progress
from wrapq.engine.record import RunResult
from wrapq.metrics import Measured, megabytes, metric, milliseconds, percent, stage_table
from wrapq.resolve.plan import Plan


class ConsoleProgress(Progress):
    """A bar with rate and remaining time for each piece of work, gone when it is done."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def task(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[], None]]:
        what = (rich.SpinnerColumn(), rich.TextColumn("{task.description}", markup=False), rich.BarColumn())
        columns = (*what, rich.MofNCompleteColumn(), _Rate(unit), rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
        hidden = not self.console.is_terminal  # a log file would only collect empty lines
        with rich.Progress(*columns, console=self.console, transient=True, disable=hidden) as bars:
            bar = bars.add_task(title, total=total)
            yield lambda: bars.advance(bar)

    def note(self, text: str) -> None:
        self.console.print(Text(f"note: {text}", "yellow"))


class _Rate(rich.ProgressColumn):
    """Steps per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: rich.Task) -> Text:
        """The rate, once there is one."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self.unit}/s" if speed and self.unit else "", "dim")


def quality_table(measured: Measured) -> Table:
    """Float against quantized: a row for each stage that was measured."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    heads, rows = stage_table(measured)
    for head in heads:
        table.add_column(head, justify="right" if head else "left")
    for row in rows:
        table.add_row(*row)
    return table


def goal_lines(verdicts: Mapping[str, GoalVerdict]) -> Iterator[Text]:
    """A line for each goal of one run."""
    for name, verdict in verdicts.items():
        row = metric(name)
        met = Text("met", "green") if verdict.met else Text("missed", "bold red")
        if verdict.survival:
            least = f"{row.label} {row.text(verdict.value)}, where it should be {row.bound(verdict.bound)}"
            yield Text(f"{COLLAPSED}: {least}", "bold red")
            continue
        reached = row.text(verdict.value) or ("none, since no weight is quantized" if row.cost else "none")
        yield Text.assemble(f"goal {name}: {row.bound(verdict.bound)}, reached {reached}: ", met)


def plan_line(plan: Plan) -> Text:
    """The beginning of `wrapq run`."""
    by_pt2e = f", {len(plan.parts)} by PT2E" if plan.parts else ""
    counts = f"{len(plan.modules)} modules to quantize{by_pt2e}, {len(plan.untouched)} left in float"
    return Text.assemble((plan.recipe.name, "bold"), f" on {plan.model.path}: {counts}")


def show_result(console: Console, result: RunResult, tokens: int) -> None:
    """The end of `wrapq run`."""
    console.print(quality_table(Measured(result.metrics, result.sizes)))
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
    console.print(f"load it: wrapq.load({json.dumps(str(result.folder), ensure_ascii=False)})")
    for name, exported in result.exports.items():
        show_export(console, name, exported)


def show_export(console: Console, name: str, exported: Exported) -> None:
    """Where an export in the format `name` lies, and that it was checked."""
    console.print(f"{name}: {exported.path}, {megabytes(exported.size)} of weights")
    found = exported.figures
    line = f"loaded by its own library in a fresh process: logits off by {exported.error:.1e} of their norm"
    console.print(f"{line}, {percent(found['top1_agreement'])} of next tokens the same")
    words = {"first_token_ms": "to the first token", "token_ms": "for each after it"}
    threads = f"{exported.threads} thread{'s' if exported.threads > 1 else ''}"
    for who, before in ((f"there, with {threads}", ""), ("the float model there", "float_")):
        times = [
            f"{milliseconds(found[before + name])} {what}" for name, what in words.items() if before + name in found
        ]
        times += [f"{megabytes(found[f'{before}peak_mb'] * 1e6)} of memory"] if f"{before}peak_mb" in found else []
        if times:
            console.print(f"{who}: {', '.join(times)}")
