"""What commands have in common: arguments that compose a recipe, errors on one screen, a console."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from wrapq.errors import WrapqError

_INTERRUPTED = 130
_DEFECT = 70
GOALS_MISSED, JOBS_FAILED = 10, 11
"""The exit status of a run or sweep that ended well, with a result that was not asked for."""
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


def takes_recipe(command: Command) -> Command:
    """The arguments of every command that composes a recipe: `overrides`, `config_dirs`, and `--debug`."""
    command = click.argument("overrides", nargs=-1, type=_Overrides())(command)
    return takes_presets(command)


def takes_presets(command: Command) -> Command:
    """The options of every command that looks presets up: `config_dirs`, and `--debug`."""
    folder = click.Path(path_type=Path)
    text = "A folder with presets of your own (conf/ and recipes/)."
    command = click.option("--config-dir", "config_dirs", multiple=True, type=folder, help=text)(command)
    return click.option("--debug", is_flag=True, help="Show the traceback of an error.")(command)


def reports_errors(command: Command) -> Command:
    """One screen per error, and an exit status that says its kind; takes `--debug` out of the arguments."""

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


def make_console() -> Any:
    """A rich console on standard output."""
    from rich.console import Console

    # a terminal's width, or all that a file can take
    width = None if sys.stdout.isatty() else 200
    # of several processes the first speaks for all
    return Console(highlight=False, width=width, soft_wrap=False, quiet=os.environ.get("RANK", "0") != "0")
