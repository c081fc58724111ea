"""A run that is ended at any moment, in any way, is taken up, by whoever tries, and ends with the same bits."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random

import pytest

from tests import forked
from tests.engine.record import recorded
from tests.faults.runs import RECIPE, SMALL, arguments, digests, got_past, wait

KILLS = 40
INTERRUPTED = 130
RECIPES = {
    "w4a16_gptq": ("whole", "streaming"),
    "int16_activations": ("whole", "streaming"),
    "w4a4_rotated_gptq": ("whole",),  # transforms need the whole model
}


class Runs:
    """Processes that run a recipe into one folder, each with what it said."""

    def __init__(self, outputs: Path, recipe: str, random: Random) -> None:
        self.outputs, self.recipe, self.random = outputs, recipe, random
        self.errors: list[Path] = []
        outputs.mkdir()

    def words(self, *more: str) -> list[str]:
        load = self.random.choice(RECIPES[self.recipe])
        words = [f"recipe={self.recipe}", *SMALL, f"runtime.load={load}", f"paths.outputs={self.outputs}"]
        return ["run", *more, *words]

    def start(self, *more: str) -> BaseProcess:
        self.errors.append(self.outputs / f"errors-{len(self.errors)}")
        return forked.start(self.words(*more), self.outputs, [self.outputs / "said", self.errors[-1]])

    def check_resumed(self, second: BaseProcess) -> None:
        """A process that resumes finishes the run, finds none, or is told who has it."""
        second.join(forked.TIMEOUT)
        said = self.errors[-1].read_text()
        known = {0: "", 4: "error: nothing to resume: ", 5: " is in use by "}
        assert second.exitcode in known and known[second.exitcode] in said, (second.exitcode, said)

    def finished(self) -> bool:
        return any(json.loads(path.read_text())["status"] == "FINISHED" for path in self.outputs.glob("*/*/run.json"))


def end(runs: Runs, number: signal.Signals, seconds: float) -> str:
    """End a run after so many seconds, while a second process tries to resume it; returns what became of it."""
    first, second = runs.start(), None
    said = runs.errors[0]
    ends = time.monotonic() + seconds
    while first.exitcode is None and time.monotonic() < ends:
        if second is None or second.exitcode is not None:
            if second is not None:
                runs.check_resumed(second)
            second = runs.start("--resume")
        time.sleep(0.005)
    if first.exitcode is None:
        os.kill(first.pid, number)
    first.join(forked.TIMEOUT)
    begun = list(runs.outputs.glob("*/*/run.json"))
    if first.exitcode == INTERRUPTED:
        assert number != signal.SIGKILL and "error: interrupted" in said.read_text()
    elif first.exitcode == -number:  # a signal that comes before the command has begun ends the process at once
        assert number == signal.SIGKILL or not begun
    else:
        assert first.exitcode == 0, said.read_text()
    if second is not None:
        runs.check_resumed(second)
    if runs.finished():
        return "finished before" if first.exitcode == 0 else "resumed by the second process"
    for folder in begun if first.exitcode == INTERRUPTED else ():
        assert json.loads(folder.read_text())["reason"] == "interrupted"
    third = runs.start("--resume")
    runs.check_resumed(third)
    if runs.finished():
        return "resumed"
    again = runs.start()
    again.join(forked.TIMEOUT)
    assert again.exitcode == 0, runs.errors[-1].read_text()
    return "begun anew"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", RECIPES)
def test_ended_at_random_moments(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = Random(f"40 kills of {recipe}")
    undisturbed = Runs(tmp_path / "undisturbed", recipe, random)
    forked.prepare()
    began = time.monotonic()
    assert end(undisturbed, signal.SIGKILL, math.inf) == "finished before"  # the second process slows it down
    seconds = time.monotonic() - began
    came = Counter[str]()
    first = list(RECIPES).index(recipe)
    for index in range(first, KILLS, len(RECIPES)):
        number = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)[index // len(RECIPES) % 3]
        runs = Runs(tmp_path / str(index), recipe, random)
        what = end(runs, number, random.uniform(0.2, 1) * seconds)
        came[f"{number.name}: {what}"] += 1
        assert digests(runs.outputs) == digests(undisturbed.outputs), f"{index}: {number.name}, {what}"
        (lock,) = runs.outputs.glob("*/*/recipe.lock.yaml")
        assert not [path for path in lock.parent.iterdir() if path.name.startswith(".")]
        assert (lock.parent / "report.html").is_file()
    with capsys.disabled():
        print(f"\n{recipe}:", dict(sorted(came.items())))
    assert any("resumed" in what for what in came)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_tracked_run_is_closed_and_taken_up(
    number: signal.Signals, tmp_path: Path, undisturbed: dict[str, str], new_store: Callable[[Path], None]
) -> None:
    outputs = tmp_path / "out"
    new_store(outputs / "mlflow.db")
    words = [word.replace("tracking=none", "tracking=mlflow") for word in arguments(outputs)]
    first = forked.start(words, tmp_path, [outputs / "said", outputs / "errors"])
    wait(got_past(outputs, 1))
    os.kill(first.pid, number)
    first.join(forked.TIMEOUT)
    assert first.exitcode == (-number if number == signal.SIGKILL else INTERRUPTED), (outputs / "errors").read_text()
    (status,) = outputs.glob(f"{RECIPE}/*/run.json")
    if number != signal.SIGKILL:
        assert json.loads(status.read_text())["reason"] == "interrupted"
    wait(lambda: recorded(outputs / "mlflow.db").info.status in ("FAILED", "KILLED"), 60)
    done = forked.wrapq([*words, "--resume"])
    assert done.returncode == 0, done.stderr
    assert "note: resumed before block" in done.stdout and digests(outputs) == [undisturbed]
    assert recorded(outputs / "mlflow.db").info.status == "FINISHED"
