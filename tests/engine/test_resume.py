"""A killed run is taken up where it was, and ends with the bits of one that was not."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import yaml

LOADS = ("whole", "streaming")
SMALL = ["evaluation.tokens=1024", "calibration.samples=8", "calibration.batch_size=4", "tracking=none"]


def command(outputs: Path, *more: str) -> list[str]:
    recipe = ["recipe=w4a16_gptq", "rules.linear.input=int8:tensor:asym", "+algorithm@stack.ranges=ranges"]
    return [sys.executable, "-m", "wrapq", "run", *more, *recipe, *SMALL, f"paths.outputs={outputs}"]


def digests(outputs: Path) -> dict[str, str]:
    (lock,) = outputs.glob("w4a16_gptq/*/recipe.lock.yaml")
    found = yaml.safe_load(lock.read_text())["digests"]
    return {key: found[key] for key in ("qparams", "outputs")}


def run_and_kill(outputs: Path, pattern: str, *more: str) -> None:
    """Start a run and kill it as soon as a file of its folder matches `pattern`."""
    process = subprocess.Popen([*command(outputs), *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if any(outputs.glob(f"w4a16_gptq/*/{pattern}")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    outputs = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(outputs), check=True, capture_output=True)
    return digests(outputs)


@pytest.mark.parametrize("border", [1, 2, 3])
def test_killed_after_a_block_ends_with_the_same_bits(tmp_path, undisturbed, border):
    run_and_kill(tmp_path, f"resume/points-{border}.safetensors")
    assert not list(tmp_path.glob("w4a16_gptq/*/model.safetensors"))
    resumed = subprocess.run(command(tmp_path, "--resume"), capture_output=True, text=True)
    if border == 1 and "nothing to resume" in resumed.stderr:
        return  # killed between the files of the first border and the line that makes them count
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"note: resumed before block \d", resumed.stdout)
    assert digests(tmp_path) == undisturbed
    assert not list(tmp_path.glob("w4a16_gptq/*/resume"))


@pytest.mark.parametrize(
    ("pattern", "killed", "resumed"),
    [
        ("modules.json", "whole", "whole"),  # the model is saved, and not yet checked
        ("modules.json", "streaming", "streaming"),
        ("resume/points-4.safetensors", "streaming", "whole"),  # of the last block, while quality is being measured
    ],
    ids=["saving", "saving, streamed", "streamed, resumed with the whole model"],
)
def test_killed_after_the_last_block(tmp_path, undisturbed, pattern, killed, resumed):
    run_and_kill(tmp_path, pattern, f"runtime.load={killed}")
    again = [*command(tmp_path, "--resume"), f"runtime.load={resumed}"]
    done = subprocess.run(again, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path) == undisturbed
    (folder,) = tmp_path.glob("w4a16_gptq/*")
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".") or path.name == "resume"]
    assert len(list(folder.glob("model.safetensors"))) == (resumed == "whole")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_twenty_random_moments(tmp_path, undisturbed, capsys):
    """Each run is killed at a random moment and taken up, whole or streamed; one that kept nothing starts anew."""
    random = Random(20)
    start = time.monotonic()
    subprocess.run(command(tmp_path / "timed"), check=True, capture_output=True)
    seconds = time.monotonic() - start
    ends = {"finished": 0, "resumed": 0, "anew": 0}
    for number in range(20):
        outputs = tmp_path / str(number)
        process = subprocess.Popen(
            [*command(outputs), f"runtime.load={random.choice(LOADS)}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(random.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        again = [*command(outputs, "--resume"), f"runtime.load={random.choice(LOADS)}"]
        done = subprocess.run(again, capture_output=True, text=True)
        end = "resumed" if done.returncode == 0 else "anew"
        if end == "anew":
            assert "nothing to resume: no unfinished run" in done.stderr
            end = "finished" if list(outputs.glob("w4a16_gptq/*/recipe.lock.yaml")) else "anew"
        if end == "anew":
            subprocess.run(command(outputs), check=True, capture_output=True)
        ends[end] += 1
        assert digests(outputs) == undisturbed, f"run {number} ({end})"
    assert ends["resumed"]
    with capsys.disabled():
        print(ends)


def test_changed_recipe_is_refused(tmp_path):
    run_and_kill(tmp_path, "resume/points-2.safetensors")
    other = subprocess.run([*command(tmp_path, "--resume"), "stack.round.damp=0.05"], capture_output=True, text=True)
    assert other.returncode == 4
    assert "changed since it stopped: plan" in other.stderr


def test_nothing_to_resume_says_so(tmp_path):
    result = subprocess.run(command(tmp_path, "--resume"), capture_output=True, text=True)
    assert result.returncode == 4
    assert "nothing to resume: no unfinished run of w4a16_gptq" in result.stderr
