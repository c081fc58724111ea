"""Commands on what runs left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click

from wrapq.cli.command import compose_recipe, make_console, say, takes_recipe
from wrapq.paths import expand

_AWAY = 6  # as when a tracking store refuses a run
_EXPORT_KEYS = ("export", "runtime", "paths")


@click.command()
@click.argument("path")
@takes_recipe
def evaluate(path: str, overrides: tuple[str, ...], config_dirs: tuple[Path, ...]) -> None:
    """Measure a finished run's model, or a float model, on a recipe's evaluation text.

    PATH is the folder of a run, a model in Hugging Face layout, or wrapq://demo.
    """
    composed = compose_recipe([*overrides, f"model.path={json.dumps(path)}"], config_dirs)
    from wrapq.console.run_summary import ConsoleProgress, quality_table
    from wrapq.engine.evaluate import evaluate as measure
    from wrapq.metrics import Measured

    console = make_console()
    metrics, size = measure(composed.recipe, composed.settings, ConsoleProgress(console))
    console.print(quality_table(Measured({path: metrics}, {path: size})))


@click.command()
@click.argument("run")
@click.option("--to", "target", type=click.Path(path_type=Path), help="A new folder, instead of one in the run's.")
@takes_recipe
def export(run: str, overrides: tuple[str, ...], config_dirs: tuple[Path, ...], target: Path | None) -> None:
    """Write a finished run's model in other projects' formats: wrapq export RUN export=[onnx,openvino]

    RUN is the folder of a run, or the name of a recipe whose newest run is meant.
    """
    others = [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0] not in _EXPORT_KEYS]
    if others:
        raise click.UsageError(f"{others[0]}: a finished run takes only {', '.join(_EXPORT_KEYS)}")
    composed = compose_recipe(overrides, config_dirs)
    from wrapq.console.run_summary import ConsoleProgress, show_export
    from wrapq.engine.export import export_run

    console = make_console()
    progress = ConsoleProgress(console)
    target = target and expand(target)
    for name, exported in export_run(run, composed.recipe.export, composed.settings, progress, target).items():
        show_export(console, name, exported)


@click.command()
@click.option("--port", default=5000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@takes_recipe
def ui(overrides: tuple[str, ...], config_dirs: tuple[Path, ...], host: str, port: int) -> None:
    """Open MLflow on the record of all runs."""
    from wrapq.tracking.stores import store_uri, ui_command

    settings = compose_recipe(overrides, config_dirs).settings
    command = ui_command(store_uri(settings), Path(settings.paths.outputs), host, port)
    say(f"MLflow at http://{host}:{port} (stop with Ctrl-C)")
    sys.exit(subprocess.call(command))


@click.command()
@takes_recipe
def sync(overrides: tuple[str, ...], config_dirs: tuple[Path, ...]) -> None:
    """Send what a tracking server did not take during runs: wrapq sync [FOLDER]... [tracking.uri=...]

    FOLDER is that of a run or of many; the outputs folder when none is named.
    """
    folders = [expand(text) for text in overrides if "=" not in text]
    settings = compose_recipe([text for text in overrides if "=" in text], config_dirs).settings
    from wrapq.console.sync_summary import synced_line
    from wrapq.tracking.sync import sync as send

    where = settings.tracking
    left = 0
    for folder in folders or [Path(settings.paths.outputs)]:
        for synced in send(folder, where.uri, None if where.experiment == "wrapq" else where.experiment):
            say(synced_line(synced))
            left += synced.left
    sys.exit(_AWAY if left else 0)


@click.command()
@click.option("--clear", is_flag=True, help="Remove everything.")
@takes_recipe
def cache(overrides: tuple[str, ...], config_dirs: tuple[Path, ...], clear: bool) -> None:
    """Show or clear the statistics that runs share."""
    settings = compose_recipe(overrides, config_dirs).settings
    from wrapq.console.cache_table import cache_table
    from wrapq.metrics import megabytes
    from wrapq.statistics.store import Store

    store = Store(settings.paths.cache_folder(), settings.runtime.cache_gb * 1e9)
    if clear:
        removed, freed = store.collect(0)
        say(f"removed {removed} statistics, {megabytes(freed)}, from {store.folder}")
    else:
        make_console().print(cache_table(store))
