"""A killed run is taken up where it was, and ends with the bits of one that was not."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

SMALL = ["evaluation.tokens=1024", "calibration.samples=8", "calibration.batch_size=4", "tracking=none"]


def command(outputs: Path, *more: str) -> list[str]:
    recipe = ["recipe=w4a16_gptq", "rules.linear.input=int8:tensor:asym", "+algorithm@stack.ranges=ranges"]
    return [sys.executable, "-m", "wrapq", "run", *more, *recipe, *SMALL, f"paths.outputs={outputs}"]


def digests(outputs: Path) -> dict[str, str]:
    (lock,) = outputs.glob("w4a16_gptq/*/recipe.lock.yaml")
    found = yaml.safe_load(lock.read_text())["digests"]
    return {key: found[key] for key in ("qparams", "outputs")}


def run_and_kill(outputs: Path, pattern: str) -> None:
    """Start a run and kill it as soon as a file of its folder matches `pattern`."""
    process = subprocess.Popen(command(outputs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
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


def test_changed_recipe_is_refused(tmp_path):
    run_and_kill(tmp_path, "resume/points-2.safetensors")
    other = subprocess.run([*command(tmp_path, "--resume"), "stack.round.damp=0.05"], capture_output=True, text=True)
    assert other.returncode == 4
    assert "changed since it stopped: plan" in other.stderr


def test_nothing_to_resume_says_so(tmp_path):
    result = subprocess.run(command(tmp_path, "--resume"), capture_output=True, text=True)
    assert result.returncode == 4
    assert "nothing to resume: no unfinished run of w4a16_gptq" in result.stderr
