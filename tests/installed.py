"""Packages that count as installed, for tests of plug-ins, and an interpreter that finds them as it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

_COMMANDS = """
import json, os, sys
from click.testing import CliRunner
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from wrapq.cli import main
for line in sys.stdin:
    result = CliRunner().invoke(main, json.loads(line))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    print(json.dumps([result.exit_code, result.output]), file=answers, flush=True)
"""


def write_package(folder: Path, name: str, groups: Mapping[str, Mapping[str, str]]) -> None:
    """Make the package `name`, whose modules lie in `folder`, one that is installed, with the entry points `groups`."""
    facts = folder / f"{name}-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", "Version: 1", ""]))
    entries = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items())
    (facts / "entry_points.txt").write_text("\n".join(entries))


class Interpreter:
    """A new interpreter in `folder`, whose packages are installed for it; it runs commands one after another."""

    def __init__(self, folder: Path) -> None:
        self.errors = (folder / "errors.txt").open("w+")
        root = str(Path(__file__).resolve().parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), root]), "COLUMNS": "240"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _COMMANDS],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip

    def wrapq(self, *arguments: str) -> tuple[int, str]:
        """Status and output of `wrapq ARGUMENTS`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, Path(self.errors.name).read_text()[-3000:]
        status, said = json.loads(answer)
        return status, said

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.communicate()
        self.errors.close()
