"""The examples of README.md and of the pages in docs/ do what they say.

Each section is a folder of its own and its code blocks run in order. A block with a path after its language is a file;
other `python` blocks are executed. `console` blocks hold commands after `$`; the lines below one must be among what it
prints, up to spacing, and `...` stands for any lines.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import forked
from tests.installed import write_package
from wrapq.cli.command import _DEFECT, _INTERRUPTED, _MEMORY, _UNREAD, GOALS_MISSED, JOBS_FAILED, MODEL_COLLAPSED
from wrapq.cli.comparison import _DIFFERS
from wrapq.errors import CalibrationError, ModelError, OutputError, WrapqError
from wrapq.recipe.compose import compose
from wrapq.resolve.resolve import resolve
from wrapq.tracking.base import TrackingError

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = "evaluation.tokens=1024 evaluation.seq_len=128 runtime.kernels=reference"
SMALL_CALIBRATION = "calibration.samples=4 calibration.seq_len=64"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it is or nothing, and its text."""

    language: str
    path: str
    text: str


def sections() -> dict[str, list[Block]]:
    """The blocks under each heading of the second level of each page."""
    found = {}
    for page in PAGES:
        parts = re.split(r"^## (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for title, text in zip(parts[1::2], parts[2::2], strict=True):
            found[f"{page.stem}: {title}"] = [Block(*match.groups()) for match in BLOCK.finditer(text)]
    run = {title: [b for b in blocks if b.language != "text"] for title, blocks in found.items()}  # text is to be read
    return {title: blocks for title, blocks in run.items() if blocks}


PLUGINS = [title for title in sections() if title.startswith("extending: ")]
"""Each starts several interpreters, since plug-ins are found as one starts: all but the first are slow."""
TRACKED = "README: Tracking"
"""The section that is about records: the others run without them."""


@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=pytest.mark.slow if title in PLUGINS[1:] else ()) for title in sections()]
)
def test_section(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_store: Callable[[Path], None]
) -> None:
    if title == TRACKED:
        new_store(tmp_path / "outputs" / "mlflow.db")
    follow(title, Reader(tmp_path, tracked=title == TRACKED, typed=False), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("title", [TRACKED, "README: Recipes", "README: What a run leaves", "README: Sweeps"])
def test_section_as_it_is_typed(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command by a shell and the installed `wrapq`, recorded, and the server of the records with it."""
    follow(title, Reader(tmp_path, tracked=True, typed=True), monkeypatch)


@dataclass(frozen=True)
class Reader:
    """Where commands are given, whether runs are recorded, and whether each command is a process of its own."""

    folder: Path
    tracked: bool
    typed: bool


def follow(title: str, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reader.folder)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(reader.folder))
    for block in sections()[title]:
        if block.path:
            write_file(block, reader.folder)
        else:
            RUNNERS[block.language](block.text, reader)


def write_file(block: Block, folder: Path) -> None:
    """Write the file; a recipe must compose, and fit the shipped model where its data is there already."""
    path = folder / block.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text, encoding="utf-8")
    if block.language == "yaml" and path.parent == folder:
        composed = compose([f"recipe={path}"])
        if composed.recipe.calibration.source == "demo":
            assert resolve(composed.recipe, composed.sources).modules


def run_python(text: str, reader: Reader) -> None:
    if list(reader.folder.rglob("*.py")):  # plug-ins of the reader's
        run([sys.executable, "-c", text], reader.folder)
    else:
        result = forked.wrapq(["-c", text], reader.folder)
        assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


def run_toml(text: str, reader: Reader) -> None:
    """Let the folder, which is on the path, be an installed package with the entry points of `text`."""
    write_package(reader.folder, "team", tomllib.loads(text)["project"]["entry-points"])


def run_console(text: str, reader: Reader) -> None:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        if command.startswith("wrapq ui"):
            if reader.typed:
                check_server(command, reader.folder)
            continue
        assert command.startswith(("wrapq ", "python -c ")), command
        result = run_command(small(command, reader.tracked), reader)
        said = f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        assert result.returncode == (2 if shown.startswith("error:") else 0), said
        assert_shown(shown, result.stdout + result.stderr, command)


def run_command(command: str, reader: Reader) -> subprocess.CompletedProcess[str]:
    """What the shell runs; without plug-ins of the reader's a `wrapq` that is not typed needs no new interpreter."""
    simple = re.fullmatch(r"(wrapq [^>|$;&]*?)(?: > (\S+)| \|\| test \$\? = (\d))?", command)
    folder = reader.folder
    if reader.typed or not simple or command.startswith("wrapq schema") or list(folder.rglob("*.py")):
        return run(["bash", "-c", command], folder, status=None)
    words = [sorted(map(str, folder.glob(word))) if "/*" in word else [word] for word in shlex.split(simple[1])[1:]]
    result = forked.wrapq([word for several in words for word in several], folder)
    if simple[2]:
        (folder / simple[2]).write_text(result.stdout, encoding="utf-8")
    if simple[3]:
        result.returncode = int(result.returncode not in (0, int(simple[3])))
    return result


def small(command: str, tracked: bool) -> str:
    """The same command with less data; a recipe in which nothing is calibrated takes no such settings."""
    if not command.startswith(("wrapq run", "wrapq sweep")):
        return command
    reads_data = not re.search(r"w8a16|w4a16_rtn|mine", command)
    return " ".join([command, SMALL, SMALL_CALIBRATION if reads_data else "", "" if tracked else "tracking=none"])


def assert_shown(shown: str, printed: str, command: str) -> None:
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for line in shown.splitlines():
        wanted = " ".join(line.split())
        found = wanted in ("", "...") or any(wanted in line for line in lines)
        assert found, f"{command} does not print\n{line}\nbut\n{printed}"


def check_server(command: str, folder: Path) -> None:
    """The page is there after a while, and everything ends on Ctrl-C."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [*shlex.split(command), "--port", str(port)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # five more processes that nobody asks here
    )
    try:
        wait_for_page(f"http://127.0.0.1:{port}/", process)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def wait_for_page(url: str, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as page:
                assert b"MLflow" in page.read()
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"no page at {url}")


def run(command: list[str], folder: Path, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240, check=False
    )
    assert status in (None, result.returncode), f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


RUNNERS = {"python": run_python, "toml": run_toml, "console": run_console}


def test_the_first_commands_are_there() -> None:
    """`.ci/run` reads the second one from the README and runs it; what downloads a model is composed here alone."""
    matches = BLOCK.finditer(README.read_text(encoding="utf-8"))
    text, real = [match.group(3) for match in matches if match.group(1) == "sh"]
    assert text.splitlines() == ["pip install -e . && wrapq run", "pip install -e '.[test]' && pytest"]
    packages, unpack, command = real.splitlines()
    recipe = compose(shlex.split(command.removeprefix("wrapq run "))).recipe
    assert recipe.model.path in unpack and recipe.model.dequantize and "[real]" in packages
    assert "grep -m 1 -E '^pip install .* && pytest' README.md" in (README.parent / ".ci" / "run").read_text()


def test_every_recipe_it_names_exists() -> None:
    text = README.read_text(encoding="utf-8")
    for name in set(re.findall(r"recipe=(\w+)(?![\w.])", text)):
        assert (README.parent / "recipes" / f"{name}.yaml").is_file(), name
    for path in re.findall(r"python (docs/examples/\w+\.py)", text):
        assert (ROOT / path).is_file(), path


def test_the_exit_statuses_are_those_of_the_errors() -> None:
    section = README.read_text().split("## Exit statuses")[1].split("## ")[0]
    listed = {
        int(number) for row in re.findall(r"^\| ([\d, ]+) \|", section, re.MULTILINE) for number in row.split(",")
    }
    errors = {kind.exit_code for kind in (WrapqError, CalibrationError, ModelError, OutputError, TrackingError)}
    answers = {0, _DIFFERS, GOALS_MISSED, JOBS_FAILED, MODEL_COLLAPSED, _MEMORY, _DEFECT, _INTERRUPTED, _UNREAD}
    assert listed == errors | answers
