"""The command line: a file for each kind of command. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import signal
from typing import Any

import click

import wrapq
from wrapq.cli.compare import compare, diff, recipe, verify
from wrapq.cli.library import presets, schema
from wrapq.cli.records import cache, evaluate, export, sync, ui
from wrapq.cli.runs import plan, run, sweep

_COMMANDS = (run, plan, sweep, diff, compare, verify, recipe, presets, schema, evaluate, export, ui, sync, cache)


def _stop(signum: int, frame: Any) -> None:
    # not by way of SIGINT, which a shell ignores on behalf of what it starts in the background
    raise KeyboardInterrupt


@click.group(commands=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(wrapq.__version__, prog_name="wrapq")
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
    signal.signal(signal.SIGTERM, _stop)
