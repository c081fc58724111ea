"""The command line. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import wrapq
from wrapq.errors import WrapqError

_INTERRUPTED = 130
_DEFECT = 70
_GOALS_MISSED = 10
_JOBS_FAILED = 11
_EXPORT_KEYS = ("export", "runtime", "paths")
Command = Callable[..., Any]


class _Overrides(click.ParamType):
    """Hydra overrides, with completion of recipes, presets and keys."""

    name = "override"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """What may stand where `incomplete` is being typed."""
        from click.shell_completion import CompletionItem

        from wrapq.recipe.presets import list_presets
        from wrapq.recipe.schema import Recipe

        choices = {f"{preset.kind}={preset.name}": preset.description for preset in list_presets()}
        keys = {f"{key}.": field.description for key, field in Recipe.model_fields.items()}
        found = choices if "=" in incomplete else {f"{kind}=": "" for kind in (c.split("=")[0] for c in choices)} | keys
        return [CompletionItem(value, help=text) for value, text in found.items() if value.startswith(incomplete)]


def _takes_recipe(command: Command) -> Command:
    """The arguments of every command that composes a recipe."""
    command = click.argument("overrides", nargs=-1, type=_Overrides())(command)
    folder = click.Path(path_type=Path)
    text = "A folder with presets of your own (conf/ and recipes/)."
    command = click.option("--config-dir", "config_dirs", multiple=True, type=folder, help=text)(command)
    return click.option("--debug", is_flag=True, help="Show the traceback of an error.")(command)


def _reports_errors(command: Command) -> Command:
    """One screen per error, and an exit status that says its kind."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            _fail("interrupted; what was finished is kept, nothing is half written", _INTERRUPTED, debug)
        except WrapqError as error:
            _fail(str(error), error.exit_code, debug)
        except (click.ClickException, click.Abort, click.exceptions.Exit, SystemExit, BrokenPipeError):
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}\nThis is a defect of wrapq; --debug shows where it happened."
            _fail(what, _DEFECT, debug)

    return run


def _fail(message: str, status: int, debug: bool) -> None:
    if debug:
        raise
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(message, err=True)
    sys.exit(status)


def _stop(signum: int, frame: Any) -> None:
    # not by way of SIGINT, which a shell ignores on behalf of what it starts in the background
    raise KeyboardInterrupt


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(wrapq.__version__, prog_name="wrapq")
def main() -> None:
    """Post-training quantization by recipe.

    \b
    wrapq run                                          the demonstration, on the model that ships with wrapq
    wrapq presets                                      what there is to choose from
    wrapq plan recipe=w8a8_static model=hf model.path=PATH
    wrapq run  recipe=w8a8_static model=hf model.path=PATH rules.linear.weight.observer=mse
    wrapq sweep recipe=w4a16_rtn,w4a16_gptq            every combination of the values given

    Every argument is a Hydra override of the recipe. Tab completion for bash: eval "$(_WRAPQ_COMPLETE=bash_source
    wrapq)" (zsh_source, fish_source likewise).
    """
    signal.signal(signal.SIGTERM, _stop)


@main.command()
@click.option("--resume", is_flag=True, help="Take up the newest run of the recipe that did not finish.")
@_takes_recipe
@_reports_errors
def run(overrides: tuple[str, ...], config_dirs: tuple[Path, ...], resume: bool) -> None:
    """Run a recipe: quantize, measure, save, record. The exit status is 10 when a goal of the recipe is missed."""
    from wrapq.recipe.compose import compose

    composed = compose(overrides, config_dirs)
    from wrapq.tracking import make_tracker

    console = _console()
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
            sys.exit(_GOALS_MISSED)


@main.command()
@_takes_recipe
@_reports_errors
def sweep(overrides: tuple[str, ...], config_dirs: tuple[Path, ...]) -> None:
    """Run a recipe many times: wrapq sweep recipe=w4a16_rtn,w4a16_gptq rules.linear.weight.group_size=32,64,128

    Several values, range(1,9,2) or glob(w4*) give a job for every combination; sweep=optuna chooses among them and from
    interval(0.001,0.1). launcher=joblib, slurm or ray runs jobs side by side. The same command goes on with a sweep
    that was interrupted. The exit status is 11 when a job failed, 10 when no job meets all goals.
    """
    from wrapq.recipe.axes import parse_axes

    parse_axes(overrides, config_dirs)  # what can be said at once
    from wrapq.report.sweep import ConsoleSweep, show_sweep
    from wrapq.sweep.run import sweep as run_sweep

    console = _console()
    result = run_sweep(overrides, config_dirs, ConsoleSweep(console))
    show_sweep(console, result)
    if result.table.failed:
        sys.exit(_JOBS_FAILED)
    if result.table.has_goals and result.table.winner is None:
        sys.exit(_GOALS_MISSED)


@main.command()
@click.option("--full", is_flag=True, help="A line for every module, also in repeated blocks.")
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON.")
@_takes_recipe
@_reports_errors
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
    console = _console()
    for part in plan_tables(resolved, full):
        console.print(part)
        console.print()


@main.command()
@click.option("--config-dir", "config_dirs", multiple=True, type=click.Path(path_type=Path), help="Look here too.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@_reports_errors
def presets(config_dirs: tuple[Path, ...]) -> None:
    """List recipes, schemes, algorithms and the other presets."""
    from wrapq.recipe.presets import list_presets

    rows = [(f"{p.kind}={p.name}", p.description, p.origin) for p in list_presets(config_dirs)]
    width = max(len(row[0]) for row in rows)
    for choice, description, origin in rows:
        click.echo(f"{choice:<{width}}  {description}" + ("" if origin == "wrapq" else f"  [{origin}]"))


@main.command()
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@_reports_errors
def schema() -> None:
    """Print the JSON schema of a recipe file, for editors."""
    from wrapq.calibration.algorithm import ALGORITHMS
    from wrapq.calibration.sources.base import SOURCES
    from wrapq.recipe.json_schema import recipe_schema
    from wrapq.resolve.exporter import EXPORTERS

    algorithms = {name: ALGORITHMS.get(name).Options for name in ALGORITHMS}
    sources = {name: SOURCES.get(name).Options for name in SOURCES}
    exporters = {name: EXPORTERS.get(name).Options for name in EXPORTERS}
    click.echo(json.dumps(recipe_schema(algorithms, sources, exporters), indent=1))


@main.command()
@click.option("--port", default=5000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@_takes_recipe
@_reports_errors
def ui(overrides: tuple[str, ...], config_dirs: tuple[Path, ...], host: str, port: int) -> None:
    """Open MLflow on the record of all runs."""
    from wrapq.recipe.compose import compose
    from wrapq.tracking import store_uri, ui_command

    settings = compose(overrides, config_dirs).settings
    command = ui_command(store_uri(settings), Path(settings.paths.outputs), host, port)
    click.echo(f"MLflow at http://{host}:{port} (stop with Ctrl-C)")
    sys.exit(subprocess.call(command))


@main.command()
@click.argument("path")
@_takes_recipe
@_reports_errors
def evaluate(path: str, overrides: tuple[str, ...], config_dirs: tuple[Path, ...]) -> None:
    """Measure a finished run's model, or a float model, on a recipe's evaluation text.

    PATH is the folder of a run, a model in Hugging Face layout, or wrapq://demo.
    """
    from wrapq.recipe.compose import compose

    composed = compose([*overrides, f"model.path={json.dumps(path)}"], config_dirs)
    from wrapq.engine.evaluate import evaluate as measure
    from wrapq.report.console import ConsoleProgress, quality_table

    console = _console()
    metrics, size = measure(composed.recipe, composed.settings, ConsoleProgress(console))
    console.print(quality_table({path: metrics}, {path: size}))


@main.command()
@click.argument("run")
@click.option("--to", "target", type=click.Path(path_type=Path), help="A new folder, instead of one in the run's.")
@_takes_recipe
@_reports_errors
def export(run: str, overrides: tuple[str, ...], config_dirs: tuple[Path, ...], target: Path | None) -> None:
    """Write a finished run's model in another project's format: wrapq export RUN export=compressed_tensors

    RUN is the folder of a run, or the name of a recipe whose newest run is meant.
    """
    from wrapq.recipe.compose import compose

    others = [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0] not in _EXPORT_KEYS]
    if others:
        raise click.UsageError(f"{others[0]}: a finished run takes only {', '.join(_EXPORT_KEYS)}")
    composed = compose(overrides, config_dirs)
    from wrapq.engine.finished import export_run
    from wrapq.report.console import ConsoleProgress, show_export

    console = _console()
    progress = ConsoleProgress(console)
    show_export(console, export_run(run, composed.recipe.export, composed.settings, progress, target))


@main.command()
@click.option("--clear", is_flag=True, help="Remove everything.")
@_takes_recipe
@_reports_errors
def cache(overrides: tuple[str, ...], config_dirs: tuple[Path, ...], clear: bool) -> None:
    """Show or clear the statistics that runs share."""
    from wrapq.recipe.compose import compose

    settings = compose(overrides, config_dirs).settings
    from wrapq.calibration.store import Store
    from wrapq.report.cache import cache_table

    store = Store(settings.paths.cache_folder(), settings.runtime.cache_gb * 1e9)
    if clear:
        removed, freed = store.collect(0)
        click.echo(f"removed {removed} statistics, {freed / 1e6:.1f} MB, from {store.folder}")
    else:
        _console().print(cache_table(store))


def _console() -> Any:
    from rich.console import Console

    # a terminal's width, or all that a file can take
    width = None if sys.stdout.isatty() else 200
    # of several processes the first speaks for all
    return Console(highlight=False, width=width, soft_wrap=False, quiet=os.environ.get("RANK", "0") != "0")
