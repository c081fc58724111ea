"""Commands that resolve and run recipes."""

from __future__ import annotations

from pathlib import Path

import click

from wrapq.cli.command import make_console, reports_errors, takes_recipe


@click.command()
@click.option("--resume", is_flag=True, help="Take up the newest run of the recipe that did not finish.")
@takes_recipe
@reports_errors
def run(overrides: tuple[str, ...], config_dirs: tuple[Path, ...], resume: bool) -> None:
    """Run a recipe: quantize, measure, save, record."""
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
        show_result(console, result, int(next(iter(result.metrics.values()))["tokens"]))


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
