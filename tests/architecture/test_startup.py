"""What answers at once imports nothing heavy."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "mlflow", "datasets", "pyarrow", "pandas", "matplotlib")
LIGHT_COMMANDS = {
    "--help": (["--help"], 0),
    "run --help": (["run", "--help"], 0),
    "presets": (["presets"], 0),
    "a mistake in the schema": (["run", "rules.linear.weigth=int8"], 2),
    "an unknown preset": (["plan", "recipe=w9a9"], 2),
}
SLOWER_THAN_ITS_LIBRARIES = 4.0


def wrapq(*arguments: str, folder: Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-m", "wrapq", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def best_time(command: list[str], folder: Path) -> float:
    """Seconds of the processor, the least of three: what else the machine does does not count."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, cwd=folder, capture_output=True, stdin=subprocess.DEVNULL, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(3))


@pytest.mark.parametrize("case", LIGHT_COMMANDS)
def test_light_commands_import_nothing_heavy_and_write_nothing(case: str, tmp_path: Path) -> None:
    arguments, status = LIGHT_COMMANDS[case]
    result = wrapq(*arguments, folder=tmp_path, options=("-X", "importtime"))
    # lines are `import time: <self> | <cumulative> | <indented name>`; only what follows the last bar is the name
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in lines}
    assert result.returncode == status, result.stderr[-2000:]
    assert "click" in imported, "the import times were not read"
    assert not imported & set(HEAVY)
    assert list(tmp_path.iterdir()) == []


def test_importing_wrapq_imports_nothing_heavy(tmp_path: Path) -> None:
    code = f"import sys, wrapq; dir(wrapq); print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_light_command_takes_about_as_long_as_its_libraries(tmp_path: Path) -> None:
    """One that composes a recipe and so does the most of them."""
    arguments, _ = LIGHT_COMMANDS["a mistake in the schema"]
    libraries = best_time([sys.executable, "-c", "import pydantic, hydra, click, rich"], tmp_path)
    command = best_time([sys.executable, "-m", "wrapq", *arguments], tmp_path)
    assert command < SLOWER_THAN_ITS_LIBRARIES * libraries
