"""The command line: a file for each kind of command. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import warnings
from typing import Any

import click

from wrapq.cli.command import format_warning, say_traceback, tell
from wrapq.cli.comparison import compare, diff, recipe, verify
from wrapq.cli.preset_commands import presets, schema
from wrapq.cli.records import cache, evaluate, export, sync, ui
from wrapq.cli.runs import plan, run, sweep
from wrapq.foreign import PlainRecord, plain
from wrapq.large_pages import use_large_pages
from wrapq.version import __version__

_COMMANDS = (run, plan, sweep, diff, compare, verify, recipe, presets, schema, evaluate, export, ui, sync, cache)

_TALKATIVE = ("torchao", "torch.utils._pytree")
"""Loggers of what torchao misses, such as kernels for GPUs, whenever transformers imports it."""


class _Commands(click.Group):
    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # while help is shown; a command tells its own
            tell(error)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:  # it shows what was typed, which may be the name of a file
            vars(error).update(message=plain(error.message))
            raise


@click.group(cls=_Commands, commands=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="wrapq")
def main() -> None:
    """Post-training quantization by recipe.

    \b
    wrapq run                                          the demonstration, on the model that ships with wrapq
    wrapq presets                                      what there is to choose from
    wrapq plan recipe=w8a8_static model=hf model.path=PATH
    wrapq run  recipe=w8a8_static model=hf model.path=PATH rules.linear.weight.observer=mse
    wrapq sweep recipe=w4a16_rtn,w4a16_gptq            a job for every combination of the values given

    Every argument is a Hydra override of the recipe. Tab completion for bash: eval "$(_WRAPQ_COMPLETE=bash_source
    wrapq)" (zsh_source, fish_source likewise).
    """
    for ending in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # Windows has no SIGHUP
        if signal.getsignal(ending) != signal.SIG_IGN:  # as `nohup` sets it
            signal.signal(ending, signal.default_int_handler)  # which ends a run as Ctrl-C does
    _hold_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error has it
    sys.excepthook = say_traceback
    logging.setLogRecordFactory(PlainRecord)  # of libraries too, which write to standard error
    warnings.formatwarning = format_warning
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    use_large_pages()


def _hold_streams() -> None:
    """Let no file that is opened get the number of a standard stream that is closed, to which C libraries write."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
