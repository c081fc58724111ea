"""Whatever a recipe or a preset says: a plan or one clear message, never a traceback, a hang, or a file elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.recipe.mutants import make_mutant
from wrapq.errors import WrapqError
from wrapq.recipe.compose import compose
from wrapq.resolve.resolve import resolve

SECONDS = 20  # for one mutant, on a busy machine


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(50, 500, 50))])
def test_mutants_are_planned_or_refused(first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: Counter[str] = Counter()
    monkeypatch.chdir(tmp_path)
    for seed in range(first, first + 50):
        folder = tmp_path / str(seed)
        folder.mkdir()
        mutant = make_mutant(seed, folder)
        before = everything(tmp_path)
        with in_time(seed):
            outcomes[outcome(mutant.overrides, mutant.presets)] += 1
        assert everything(tmp_path) == before, f"mutant {seed} wrote a file"
    assert outcomes["planned"] and outcomes["refused"] > 10, (
        outcomes
    )  # the mutants are neither all alike nor all broken


def outcome(overrides: tuple[str, ...], presets: Path | None) -> str:
    try:
        composed = compose(overrides, [presets] if presets else [])
        resolve(composed.recipe, composed.sources)
    except WrapqError as error:
        assert str(error).strip()
        assert len(str(error)) < 100_000
        return "refused"
    return "planned"


@contextmanager
def in_time(seed: int) -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise AssertionError(f"mutant {seed} takes longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def everything(folder: Path) -> list[str]:
    return sorted(os.path.join(base, name) for base, folders, files in os.walk(folder) for name in (*folders, *files))


SMALL = ("evaluation.tokens=256", "evaluation.seq_len=64", "tracking=none")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mutants_from_the_command_line(tmp_path: Path) -> None:
    """The whole way, in processes of their own: what composes is run."""
    work = tmp_path / "work"
    work.mkdir()
    codes: Counter[int] = Counter()
    for seed in range(1000, 1000 + int(os.environ.get("WRAPQ_MUTANTS", "60"))):
        folder = tmp_path / "presets" / str(seed)
        folder.mkdir(parents=True)
        mutant = make_mutant(seed, folder)
        before = [path for path in everything(tmp_path) if not path.startswith(str(work / "outputs"))]
        if any("\0" in text for text in mutant.overrides):
            continue  # no process takes such an argument
        options = ["--config-dir", str(folder)] if mutant.presets else []
        command = [sys.executable, "-m", "wrapq", "run", *options, *SMALL, *mutant.overrides]
        result = subprocess.run(command, cwd=work, capture_output=True, timeout=240, check=False)
        stderr = result.stderr.decode(errors="replace")
        codes[result.returncode] += 1
        assert result.returncode in (0, 2, 3, 4, 5), f"mutant {seed}: {result.returncode}\n{stderr[-3000:]}"
        assert "Traceback" not in stderr and "defect of wrapq" not in stderr, f"mutant {seed}\n{stderr[-3000:]}"
        after = [path for path in everything(tmp_path) if not path.startswith(str(work / "outputs"))]
        assert after == before, f"mutant {seed} wrote outside of outputs"
    assert codes[0] and codes[2], codes
