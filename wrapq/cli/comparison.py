"""Commands that put recipes and runs side by side, replay them and give them back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from wrapq.cli.command import compose_recipe, make_console, say, say_data, takes_presets, takes_recipe

_DIFFERS = 1


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN... [OVERRIDES]...")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@takes_presets
def compare(runs: tuple[str, ...], as_json: bool, config_dirs: tuple[Path, ...]) -> None:
    """Put finished runs side by side: quality, size, time, the errors of blocks and weights.

    RUN is the folder of a run, the name of a recipe whose newest run is meant, or the id of an MLflow run.
    """
    from wrapq.console.comparison_table import comparison_json, comparison_tables
    from wrapq.runs.run_record import find_run

    overrides = [text for text in runs if "=" in text]
    outputs = Path(compose_recipe(overrides, config_dirs).settings.paths.outputs)
    records = [find_run(text, outputs).read() for text in runs if "=" not in text]
    if as_json:
        say_data(json.dumps(comparison_json(records), indent=1))
        return
    console = make_console()
    for part in comparison_tables(records):
        console.print(part)
        console.print()


@click.command()
@click.argument("before")
@click.argument("after")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@takes_recipe
def diff(before: str, after: str, as_json: bool, overrides: tuple[str, ...], config_dirs: tuple[Path, ...]) -> None:
    """Show what two recipes, plans or runs do differently, module by module.

    BEFORE and AFTER are the name or file of a recipe, with overrides of its own if quoted together ("w4a16_gptq
    stack.round.damp=0.05"), the folder or MLflow id of a run, its recipe.lock.yaml, or a plan.json. The overrides that
    follow are for both. Ends with status 0 when nothing differs, 1 when something does, more when it cannot be said.
    """
    from wrapq.console.diff_table import difference_json, difference_tables
    from wrapq.engine.plan_diff import find_differences, read_side

    one, other = (read_side(text, overrides, config_dirs) for text in (before, after))
    found = find_differences(one, other)
    if as_json:
        say_data(json.dumps(difference_json(one, other, found), indent=1))
    else:
        console = make_console()
        for part in difference_tables(one, other, found):
            console.print(part)
    sys.exit(_DIFFERS if found else 0)


@click.command()
@click.argument("run")
@takes_recipe
def verify(run: str, overrides: tuple[str, ...], config_dirs: tuple[Path, ...]) -> None:
    """Run a lock again and compare: to the bit on the same kind of device and libraries, within bands elsewhere.

    RUN is the folder of a run, the name of a recipe whose newest run is meant, the id of an MLflow run, or a lock file.
    Overrides set the machine (runtime, paths) and say where model and data lie here (model.path, calibration.path).
    Ends with status 0 when the result is the same, 1 when it is not, more when it cannot be said.
    """
    from wrapq.console.replay_summary import verdict_tables
    from wrapq.console.run_summary import ConsoleProgress
    from wrapq.engine.replay import verify as replay

    console = make_console()
    verdict = replay(run, overrides, config_dirs, ConsoleProgress(console))
    for part in verdict_tables(run, verdict):
        console.print(part)
    sys.exit(0 if verdict.same else _DIFFERS)


@click.group()
def recipe() -> None:
    """Recipes as files."""


@recipe.command("from-run")
@click.argument("run")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A new file, instead of standard output.")
@takes_recipe
def from_run(run: str, output: Path | None, overrides: tuple[str, ...], config_dirs: tuple[Path, ...]) -> None:
    """Give back the recipe of a run as one file that takes nothing from presets.

    RUN is the folder of a run, the name of a recipe whose newest run is meant, the id of an MLflow run, or a lock file.
    """
    from wrapq.recipe.dump import to_yaml, write_new
    from wrapq.runs.lock import read_lock
    from wrapq.runs.run_record import find_lock

    outputs = Path(compose_recipe(overrides, config_dirs).settings.paths.outputs)
    text = to_yaml(read_lock(find_lock(run, outputs)).recipe)
    if output is None:
        say_data(text)
    else:
        write_new(output, text.replace("THIS_FILE", output.name, 1))
        say(f"wrote {output}")
