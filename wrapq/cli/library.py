"""Commands on presets and the recipe format."""

from __future__ import annotations

import json
from pathlib import Path

import click

from wrapq.cli.command import reports_errors, takes_presets


@click.group(invoke_without_command=True)
@takes_presets
@click.pass_context
@reports_errors
def presets(context: click.Context, config_dirs: tuple[Path, ...]) -> None:
    """List recipes, schemes, algorithms and the other presets; show one, or begin a package of your own."""
    if context.invoked_subcommand is not None:
        return
    from collections import Counter

    from wrapq.recipe.presets import list_presets

    listed = list_presets(config_dirs)
    rows = [(f"{p.kind}={p.name}", p.description, p.origin) for p in listed]
    width = max(len(row[0]) for row in rows)
    for choice, description, origin in rows:
        click.echo(f"{choice:<{width}}  {description}" + ("" if origin == "wrapq" else f"  [{origin}]"))
    for choice, count in Counter(row[0] for row in rows).items():
        if count > 1:
            origins = " and ".join(origin for name, _, origin in rows if name == choice)
            click.secho(f"note: {choice} cannot be chosen, it is a name in {origins}", fg="yellow", err=True)


@presets.command()
@click.argument("name")
@takes_presets
@click.pass_context
@reports_errors
def show(context: click.Context, name: str, config_dirs: tuple[Path, ...]) -> None:
    """Show a preset: where it is from, what its file says, and for a recipe what that comes to."""
    from wrapq.recipe.show import show_preset

    shown = show_preset(name, (*_dirs_before(context), *config_dirs))
    preset = shown.preset
    click.secho(f"{preset.kind}={preset.name}", bold=True)
    click.echo(preset.description)
    origin = f"{preset.origin} {preset.version}".rstrip()
    click.echo(f"from {origin}: {preset.path}\n\n{shown.text.rstrip()}")
    if shown.composed:
        click.secho("\ncomposes to", bold=True)
        click.echo(shown.composed.rstrip())


@presets.command()
@click.argument("name")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@reports_errors
def new(name: str) -> None:
    """Begin a package of presets in a new folder NAME, with a scheme, a recipe and a test."""
    from wrapq.recipe.scaffold import new_package

    for path in new_package(name, Path()):
        click.echo(path)
    click.echo(f"next: pip install -e './{name}[test]' && pytest {name}")


def _dirs_before(context: click.Context) -> tuple[Path, ...]:
    """What `--config-dir` named before the subcommand."""
    return tuple((context.parent and context.parent.params.get("config_dirs")) or ())


@click.command()
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@reports_errors
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
