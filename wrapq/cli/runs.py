"""Commands that resolve and run recipes."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from wrapq.cli.command import (
    GOALS_MISSED,
    JOBS_FAILED,
    MODEL_COLLAPSED,
    compose_recipe,
    make_console,
    say_data,
    takes_recipe,
)


@click.command()
@click.option("--resume", is_flag=True, help="Take up the newest run of the recipe that did not finish.")
@takes_recipe
def run(overrides: tuple[str, ...], config_dirs: tuple[Path, ...], resume: bool) -> None:
    """Run a recipe: quantize, measure, save, record.

    The exit status is 12 when the model collapsed, 10 when it misses a goal of the recipe.
    """
    composed = compose_recipe(overrides, config_dirs)
    from wrapq.tracking.mlflow import make_tracker

    console = make_console()
    with make_tracker(composed.settings) as tracker:
        tracker.prepare()  # first of all, since it takes as long as all that follows until the model is loaded
        with console.status("resolving the recipe"):
            from wrapq.console.run_summary import ConsoleProgress, plan_line, show_result
            from wrapq.engine.context import RunOptions
            from wrapq.engine.run import execute
            from wrapq.resolve.resolve import resolve

            plan = resolve(composed.recipe, composed.sources, composed.settings.runtime.trust_remote_code)
        console.print(plan_line(plan))
        result = execute(plan, composed.settings, ConsoleProgress(console), RunOptions(resume, tracker=tracker))
    if result is not None:
        from wrapq.engine.goals import all_met, collapsed

        show_result(console, result, int(next(iter(result.metrics.values()))["tokens"]))
        if collapsed(result.goals):
            sys.exit(MODEL_COLLAPSED)
        if not all_met(result.goals):
            sys.exit(GOALS_MISSED)


@click.command()
@takes_recipe
def sweep(overrides: tuple[str, ...], config_dirs: tuple[Path, ...]) -> None:
    """Run a recipe many times: wrapq sweep recipe=w4a16_rtn,w4a16_gptq rules.linear.weight.group_size=32,64,128

    Several values, range(1,9,2) or glob(w4*) give a job for every combination; sweep=optuna chooses among them and from
    interval(0.001,0.1). launcher=joblib, slurm or ray runs jobs side by side. The same command goes on with a sweep
    that was interrupted. The exit status is 11 when a job failed, 10 when no job meets all goals.
    """
    from wrapq.recipe.axes import parse_axes

    parse_axes(overrides, config_dirs)  # before anything heavy is imported
    from wrapq.console.sweep_table import ConsoleSweep, show_sweep
    from wrapq.sweep.driver import sweep as run_sweep

    console = make_console()
    result = run_sweep(overrides, config_dirs, ConsoleSweep(console))
    show_sweep(console, result)
    if result.table.failed:
        sys.exit(JOBS_FAILED)
    if result.table.winner is None:
        sys.exit(GOALS_MISSED if result.table.has_goals else MODEL_COLLAPSED)


@click.command()
@click.option("--full", is_flag=True, help="A line for every module, also in repeated blocks.")
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON.")
@takes_recipe
def plan(overrides: tuple[str, ...], config_dirs: tuple[Path, ...], full: bool, as_json: bool) -> None:
    """Show what a recipe would do, without reading weights."""
    composed = compose_recipe(overrides, config_dirs)
    from wrapq.calibration.processes import Processes
    from wrapq.console.plan_table import plan_tables
    from wrapq.engine.preflight import check_machine
    from wrapq.engine.run_data import preview_data
    from wrapq.resolve.resolve import resolve

    trust = composed.settings.runtime.trust_remote_code
    resolved = resolve(composed.recipe, composed.sources, trust)
    if as_json:
        say_data(resolved.model_dump_json(indent=1))
        return
    console = make_console()
    for part in plan_tables(resolved, full):
        console.print(part)
        console.print()
    check_machine(resolved, composed.settings, Processes.from_environment())  # a plan is of use elsewhere too
    for line in preview_data(resolved, trust):
        console.print(line)
