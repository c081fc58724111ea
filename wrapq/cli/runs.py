"""Commands that resolve and run recipes."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from wrapq.cli.command import GOALS_MISSED, JOBS_FAILED, make_console, reports_errors, takes_recipe


@click.command()
@click.option("--resume", is_flag=True, help="Take up the newest run of the recipe that did not finish.")
@takes_recipe
@reports_errors
def run(overrides: tuple[str, ...], config_dirs: tuple[Path, ...], resume: bool) -> None:
    """Run a recipe: quantize, measure, save, record. The exit status is 10 when a goal of the recipe is missed."""
    from wrapq.recipe.compose import compose

    composed = compose(overrides, config_dirs)
    from wrapq.tracking import make_tracker

    console = make_console()
    with make_tracker(composed.settings) as tracker:
        tracker.prepare()  # first of all, since it takes as long as all that follows until the model is loaded
        with console.status("resolving the recipe"):
            from wrapq.engine.run import execute
            from wrapq.report.console import ConsoleProgress, show_result
            from wrapq.resolve.resolve import resolve

            plan = resolve(composed.recipe, composed.sources, composed.settings.runtime.trust_remote_code)
        console.print(
            f"[bold]{plan.recipe.name}[/] on {plan.model.path}: {len(plan.modules)} modules to quantize, "
            f"{len(plan.untouched)} left in float"
        )
        result = execute(plan, composed.settings, ConsoleProgress(console), resume, tracker)
    if result is not None:
        from wrapq.engine.goals import all_met

        show_result(console, result, int(next(iter(result.metrics.values()))["tokens"]))
        if not all_met(result.goals):
            sys.exit(GOALS_MISSED)


@click.command()
@takes_recipe
@reports_errors
def sweep(overrides: tuple[str, ...], config_dirs: tuple[Path, ...]) -> None:
    """Run a recipe many times: wrapq sweep recipe=w4a16_rtn,w4a16_gptq rules.linear.weight.group_size=32,64,128

    Several values, range(1,9,2) or glob(w4*) give a job for every combination; sweep=optuna chooses among them and from
    interval(0.001,0.1). launcher=joblib, slurm or ray runs jobs side by side. The same command goes on with a sweep
    that was interrupted. The exit status is 11 when a job failed, 10 when no job meets all goals.
    """
    from wrapq.recipe.axes import parse_axes

    parse_axes(overrides, config_dirs)  # before anything heavy is imported
    from wrapq.report.sweep import ConsoleSweep, show_sweep
    from wrapq.sweep.run import sweep as run_sweep

    console = make_console()
    result = run_sweep(overrides, config_dirs, ConsoleSweep(console))
    show_sweep(console, result)
    if result.table.failed:
        sys.exit(JOBS_FAILED)
    if result.table.has_goals and result.table.winner is None:
        sys.exit(GOALS_MISSED)


@click.command()
@click.option("--full", is_flag=True, help="A line for every module, also in repeated blocks.")
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON.")
@takes_recipe
@reports_errors
def plan(overrides: tuple[str, ...], config_dirs: tuple[Path, ...], full: bool, as_json: bool) -> None:
    """Show what a recipe would do, without reading weights."""
    from wrapq.recipe.compose import compose

    composed = compose(overrides, config_dirs)
    from wrapq.report.plan import plan_tables
    from wrapq.resolve.resolve import resolve

    resolved = resolve(composed.recipe, composed.sources, composed.settings.runtime.trust_remote_code)
    if as_json:
        click.echo(resolved.model_dump_json(indent=1))
        return
    console = make_console()
    for part in plan_tables(resolved, full):
        console.print(part)
        console.print()
