"""Commands on what runs left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click

from wrapq.cli.command import make_console, reports_errors, takes_recipe

_AWAY = 6  # as when a tracking store refuses a run
_EXPORT_KEYS = ("export", "runtime", "paths")


@click.command()
@click.argument("path")
@takes_recipe
@reports_errors
def evaluate(path: str, overrides: tuple[str, ...], config_dirs: tuple[Path, ...]) -> None:
    """Measure a finished run's model, or a float model, on a recipe's evaluation text.

    PATH is the folder of a run, a model in Hugging Face layout, or wrapq://demo.
    """
    from wrapq.recipe.compose import compose

    composed = compose([*overrides, f"model.path={json.dumps(path)}"], config_dirs)
    from wrapq.engine.evaluate import evaluate as measure
    from wrapq.report.console import ConsoleProgress, quality_table

    console = make_console()
    metrics, size = measure(composed.recipe, composed.settings, ConsoleProgress(console))
    console.print(quality_table({path: metrics}, {path: size}))


@click.command()
@click.argument("run")
@click.option("--to", "target", type=click.Path(path_type=Path), help="A new folder, instead of one in the run's.")
@takes_recipe
@reports_errors
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

    console = make_console()
    progress = ConsoleProgress(console)
    show_export(console, export_run(run, composed.recipe.export, composed.settings, progress, target))


@click.command()
@click.option("--port", default=5000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@takes_recipe
@reports_errors
def ui(overrides: tuple[str, ...], config_dirs: tuple[Path, ...], host: str, port: int) -> None:
    """Open MLflow on the record of all runs."""
    from wrapq.recipe.compose import compose
    from wrapq.tracking import store_uri, ui_command

    settings = compose(overrides, config_dirs).settings
    command = ui_command(store_uri(settings), Path(settings.paths.outputs), host, port)
    click.echo(f"MLflow at http://{host}:{port} (stop with Ctrl-C)")
    sys.exit(subprocess.call(command))


@click.command()
@takes_recipe
@reports_errors
def sync(overrides: tuple[str, ...], config_dirs: tuple[Path, ...]) -> None:
    """Send what a tracking server did not take during runs: wrapq sync [FOLDER]... [tracking.uri=...]

    FOLDER is that of a run or of many; the outputs folder when none is named.
    """
    from wrapq.recipe.compose import compose

    folders = [Path(text) for text in overrides if "=" not in text]
    settings = compose([text for text in overrides if "=" in text], config_dirs).settings
    from wrapq.report.sync import synced_line
    from wrapq.tracking.sync import sync as send

    where = settings.tracking
    left = 0
    for folder in folders or [Path(settings.paths.outputs)]:
        for synced in send(folder, where.uri, None if where.experiment == "wrapq" else where.experiment):
            click.echo(synced_line(synced))
            left += synced.left
    sys.exit(_AWAY if left else 0)


@click.command()
@click.option("--clear", is_flag=True, help="Remove everything.")
@takes_recipe
@reports_errors
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
        make_console().print(cache_table(store))
