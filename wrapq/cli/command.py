"""What commands have in common: arguments that compose a recipe, errors on one screen, a console."""

from __future__ import annotations

import errno
import functools
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from wrapq.errors import OutputError, WrapqError, out_of_memory, reason_of
from wrapq.foreign import plain

if TYPE_CHECKING:
    from wrapq.recipe.compose import Composed

_INTERRUPTED, _UNREAD = 130, 141  # as the shell says it of a process that SIGINT or SIGPIPE ended
_MEMORY, _DEFECT = 7, 70
_SPARING = "runtime.load=streaming, a smaller calibration.batch_size and evaluation.batch_size need less"
GOALS_MISSED, JOBS_FAILED, MODEL_COLLAPSED = 10, 11, 12
"""The exit status of a run or sweep that ended well, with a result that was not asked for."""
_format_warning = warnings.formatwarning
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
        begun = {value: plain(text or "") for value, text in found.items() if value.startswith(incomplete)}
        return [CompletionItem(value, help=text) for value, text in begun.items()]


def takes_recipe(command: Command) -> Command:
    """The arguments of every command that composes a recipe: `overrides`, `config_dirs`, and `--debug`."""
    return click.argument("overrides", nargs=-1, type=_Overrides())(takes_presets(command))


def takes_presets(command: Command) -> Command:
    """The options of every command that looks presets up: `config_dirs`, and `--debug`."""
    folder = click.Path(path_type=Path)
    text = "A folder with presets of your own (conf/ and recipes/)."
    return click.option("--config-dir", "config_dirs", multiple=True, type=folder, help=text)(reports_errors(command))


def reports_errors(command: Command) -> Command:
    """One screen per error, or the traceback for `--debug`, and an exit status that says its kind."""

    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> Any:
        try:
            _check_surroundings()
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            _fail("interrupted; what was finished is kept, nothing is half written", _INTERRUPTED, debug)
        except WrapqError as error:
            _fail(str(error), error.exit_code, debug)
        except (click.ClickException, click.Abort, click.exceptions.Exit, SystemExit):
            raise
        except BrokenPipeError:  # as after `| head`: nobody reads any more, and the rest goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(_UNREAD)
        except Exception as error:
            tell(error, debug)

    return run


def tell(error: Exception, debug: bool = False) -> None:
    """End with what an error says that nothing in wrapq raised on purpose: of the machine, or a defect."""
    if out_of_memory(error):
        _fail(f"the memory does not suffice ({reason_of(error)}): {_SPARING}", _MEMORY, debug)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        _fail(f"a disk is full: {_where_full(error)}; free some room", OutputError.exit_code, debug)
    what = f"{type(error).__name__}: {error}\nThis is a defect of wrapq; --debug shows where it happened."
    _fail(what, _DEFECT, debug)


def _check_surroundings() -> None:
    if sys.stdout is None:
        raise OutputError("standard output is closed: send it to a file, or to /dev/null")
    try:
        os.getcwd()
    except OSError:  # which libraries do not survive
        raise OutputError("the working directory is gone: change to one that exists") from None


def _where_full(error: OSError) -> str:
    if error.filename:
        return str(error.filename)
    try:
        os.write(1, b"")
        held = os.fstatvfs(1).f_bavail
    except OSError:
        held = 0
    return f"that of {'standard output' if not held else f'temporary files ({tempfile.gettempdir()}) or of caches'}"


def _fail(message: str, status: int, debug: bool) -> None:
    if debug:
        raise
    say("error: ", err=True, nl=False, fg="red", bold=True)
    say(message, err=True)
    sys.exit(status)


def say(text: object, err: bool = False, nl: bool = True, **style: Any) -> None:
    """Print for people; `style` is that of `click.style`."""
    shown = plain(str(text))
    click.echo(click.style(shown, **style) if style else shown, err=err, nl=nl)


def say_data(text: str) -> None:
    """Print JSON or YAML, exactly unless to a terminal."""
    click.echo(plain(text) if sys.stdout.isatty() else text, nl=not text.endswith("\n"))


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """What Python prints of a warning, mostly a library's."""
    return plain(_format_warning(message, category, filename, lineno, line))


def say_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print what Python does of an error that nothing catches, as with `--debug`."""
    say("".join(traceback.format_exception(kind, error, trace)), err=True, nl=False)


def compose_recipe(overrides: Sequence[str], config_dirs: Sequence[Path]) -> Composed:
    """The recipe and the settings that `overrides` give; raises `RecipeError`."""
    from wrapq.recipe.compose import compose

    return compose(overrides, config_dirs)


def make_console() -> Any:
    """A rich console on standard output."""
    from wrapq.console.terminal import Terminal

    # a terminal's width, or all that a file can take
    width = None if sys.stdout.isatty() else 200
    # of several processes the first speaks for all
    return Terminal(width=width, quiet=os.environ.get("RANK", "0") != "0")
