"""Commands on presets and the recipe format."""

from __future__ import annotations

import json
from pathlib import Path

import click

from wrapq.cli.command import reports_errors, takes_presets


@click.command()
@takes_presets
@reports_errors
def presets(config_dirs: tuple[Path, ...]) -> None:
    """List recipes, schemes, algorithms and the other presets."""
    from wrapq.recipe.presets import list_presets

    rows = [(f"{p.kind}={p.name}", p.description, p.origin) for p in list_presets(config_dirs)]
    width = max(len(row[0]) for row in rows)
    for choice, description, origin in rows:
        click.echo(f"{choice:<{width}}  {description}" + ("" if origin == "wrapq" else f"  [{origin}]"))


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
