"""Commands on presets and the recipe format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from wrapq.cli.command import reports_errors, say, say_data, takes_presets
from wrapq.registry import Registry


@click.group(invoke_without_command=True)
@takes_presets
@click.pass_context
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
        say(f"{choice:<{width}}  {description}" + ("" if origin == "wrapq" else f"  [{origin}]"))
    for choice, count in Counter(row[0] for row in rows).items():
        if count > 1:
            origins = " and ".join(origin for name, _, origin in rows if name == choice)
            say(f"note: {choice} cannot be chosen, it is a name in {origins}", fg="yellow", err=True)


@presets.command()
@click.argument("name")
@takes_presets
@click.pass_context
def show(context: click.Context, name: str, config_dirs: tuple[Path, ...]) -> None:
    """Show a preset: where it is from, what its file says, and for a recipe what that comes to."""
    from wrapq.recipe.show import show_preset

    before = context.parent.params.get("config_dirs") if context.parent else None
    preset, text, composed = show_preset(name, (*(before or ()), *config_dirs))
    say(f"{preset.kind}={preset.name}", bold=True)
    say(preset.description)
    origin = f"{preset.origin} {preset.version}".rstrip()
    say(f"from {origin}: {preset.path}\n\n{text.rstrip()}")
    if composed:
        say("\ncomposes to", bold=True)
        say(composed.rstrip())


@presets.command()
@click.argument("name")
@reports_errors
def new(name: str) -> None:
    """Begin a package of presets in a new folder NAME, with a scheme, a recipe and a test."""
    from wrapq.recipe.scaffold import new_package

    for path in new_package(name, Path()):
        say(path)
    say(f"next: pip install -e './{name}[test]' && pytest {name}")


@click.command()
@reports_errors
def schema() -> None:
    """Print the JSON schema of a recipe file, for editors."""
    from wrapq.algorithms.base import ALGORITHMS
    from wrapq.data.sources.base import SOURCES
    from wrapq.export.base import EXPORTERS
    from wrapq.observers.base import OBSERVERS
    from wrapq.recipe.json_schema import recipe_schema

    registries: list[Registry[Any]] = [ALGORITHMS, SOURCES, EXPORTERS, OBSERVERS]
    options = [{name: registry.get(name).Options for name in registry} for registry in registries]
    say_data(json.dumps(recipe_schema(*options), indent=1))
