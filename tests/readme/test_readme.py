"""The examples of README.md do what they say.

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
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import forked
from wrapq.recipe.compose import compose
from wrapq.resolve.resolve import resolve

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = "evaluation.tokens=1024 evaluation.seq_len=128"
SMALL_CALIBRATION = "calibration.samples=4 calibration.seq_len=64"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it is or nothing, and its text."""

    language: str
    path: str
    text: str


def sections() -> dict[str, list[Block]]:
    """The blocks under each heading of the second level."""
    parts = re.split(r"^## (.+)$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {
        title: [Block(*match.groups()) for match in BLOCK.finditer(text)]
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {title: blocks for title, blocks in found.items() if blocks}


@pytest.mark.parametrize("title", sections())
def test_section(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for block in sections()[title]:
        if block.path:
            write_file(block, tmp_path)
        else:
            RUNNERS[block.language](block.text, tmp_path)


def write_file(block: Block, folder: Path) -> None:
    """Write the file; a recipe must compose, and fit the shipped model where its data is there already."""
    path = folder / block.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text, encoding="utf-8")
    if block.language == "yaml" and path.parent == folder:
        composed = compose([f"recipe={path}"])
        if composed.recipe.calibration.source == "demo":
            assert resolve(composed.recipe, composed.sources).modules


def run_python(text: str, folder: Path) -> None:
    run([sys.executable, "-c", text], folder)


def run_toml(text: str, folder: Path) -> None:
    """Let `folder`, which is on the path, be an installed package with the entry points of `text`."""
    (folder / "team-1.dist-info").mkdir()
    lines = ["Metadata-Version: 2.1", "Name: team", "Version: 1", ""]
    (folder / "team-1.dist-info" / "METADATA").write_text("\n".join(lines))
    groups = tomllib.loads(text)["project"]["entry-points"]
    entries = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items())
    (folder / "team-1.dist-info" / "entry_points.txt").write_text("\n".join(entries))


def run_console(text: str, folder: Path) -> None:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        if command.startswith("wrapq ui"):
            check_server(command, folder)
            continue
        assert command.startswith(("wrapq ", "python -c ")), command
        result = run_command(small(command), folder)
        said = f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        assert result.returncode == (2 if shown.startswith("error:") else 0), said
        assert_shown(shown, result.stdout + result.stderr, command)


def run_command(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the shell runs; a plain command without plug-ins of the reader's needs no new interpreter."""
    if set(command) & set("*>|$;&") or command.startswith("python") or list(folder.rglob("*.py")):
        return run(["bash", "-c", command], folder, status=None)
    return forked.wrapq(shlex.split(command)[1:], folder)


def small(command: str) -> str:
    """The same command with less data; a recipe in which nothing is calibrated takes no such settings."""
    if not command.startswith(("wrapq run", "wrapq sweep")):
        return command
    reads_data = not re.search(r"w8a16|w4a16_rtn|mine", command)
    untracked = "tracking=none" if re.search(r"gptq|w8a8|notes", command) else ""
    return " ".join([command, SMALL, SMALL_CALIBRATION if reads_data else "", untracked])


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
    """`.ci/run` reads the second one from the README and runs it."""
    matches = BLOCK.finditer(README.read_text(encoding="utf-8"))
    (text,) = [match.group(3) for match in matches if match.group(1) == "sh"]
    assert text.splitlines() == ["pip install -e . && wrapq run", "pip install -e '.[test]' && pytest"]
    assert "grep -m 1 -E '^pip install .* && pytest' README.md" in (README.parent / ".ci" / "run").read_text()


def test_every_recipe_it_names_exists() -> None:
    text = README.read_text(encoding="utf-8")
    for name in set(re.findall(r"recipe=(\w+)(?![\w.])", text)):
        assert (README.parent / "recipes" / f"{name}.yaml").is_file(), name
    for name in re.findall(r"python -m wrapq\.examples\.(\w+)", text):
        assert (README.parent / "wrapq" / "examples" / f"{name}.py").is_file(), name
