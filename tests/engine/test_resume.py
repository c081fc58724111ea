"""A killed run is taken up where it was, and ends with the bits of one that was not."""

from __future__ import annotations

import re
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml

from tests import forked

SMALL = ["evaluation.tokens=256", "calibration.samples=8", "calibration.batch_size=4", "tracking=none"]


def command(outputs: Path, *more: str) -> list[str]:
    recipe = ["recipe=w4a16_gptq", "rules.linear.input=int8:tensor:asym", "+algorithm@stack.ranges=ranges"]
    return ["run", *more, *recipe, *SMALL, f"paths.outputs={outputs}"]


def digests(outputs: Path) -> dict[str, str]:
    (lock,) = outputs.glob("w4a16_gptq/*/recipe.lock.yaml")
    found = yaml.safe_load(lock.read_text())["digests"]
    return {key: found[key] for key in ("qparams", "outputs")}


def run_and_kill(outputs: Path, pattern: str, *more: str) -> None:
    """Start a run and kill it as soon as a file of its folder matches `pattern`."""
    process = start(outputs, *more)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.is_alive():
        if any(outputs.glob(f"w4a16_gptq/*/{pattern}")):
            process.kill()
            break
        time.sleep(0.001)
    process.join()
    assert process.exitcode == -signal.SIGKILL, Path(f"{outputs}.errors").read_text()


def start(outputs: Path, *more: str) -> BaseProcess:
    return forked.start([*command(outputs), *more], Path.cwd(), [Path(f"{outputs}.said"), Path(f"{outputs}.errors")])


def succeed(outputs: Path, *more: str) -> str:
    """What a run that ends well prints."""
    done = forked.wrapq(command(outputs, *more))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    outputs = tmp_path_factory.mktemp("undisturbed")
    succeed(outputs)
    return digests(outputs)


@pytest.mark.parametrize("border", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3)), 2])
def test_killed_after_a_block_ends_with_the_same_bits(tmp_path, undisturbed, border):
    run_and_kill(tmp_path, f"resume/points-{border}.safetensors")
    assert not list(tmp_path.glob("w4a16_gptq/*/model.safetensors"))
    resumed = forked.wrapq(command(tmp_path, "--resume"))
    if border == 1 and "nothing to resume" in resumed.stderr:
        return  # killed between the files of the first border and the line that makes them count
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"note: resumed before block \d", resumed.stdout)
    assert digests(tmp_path) == undisturbed
    assert not list(tmp_path.glob("w4a16_gptq/*/resume"))


@pytest.mark.parametrize(
    ("pattern", "killed", "resumed"),
    [
        pytest.param("modules.json", "whole", "whole", marks=pytest.mark.slow),  # saved, and not yet checked
        pytest.param("modules.json", "streaming", "streaming", marks=pytest.mark.slow),
        # the last block is decided, and quality is being measured
        pytest.param("resume/points-4.safetensors", "streaming", "whole", marks=pytest.mark.slow),
    ],
    ids=["saving", "saving, streamed", "streamed, resumed with the whole model"],
)
def test_killed_after_the_last_block(tmp_path, undisturbed, pattern, killed, resumed):
    run_and_kill(tmp_path, pattern, f"runtime.load={killed}")
    succeed(tmp_path, "--resume", f"runtime.load={resumed}")
    assert digests(tmp_path) == undisturbed
    (folder,) = tmp_path.glob("w4a16_gptq/*")
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".") or path.name == "resume"]
    assert len(list(folder.glob("model.safetensors"))) == (resumed == "whole")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["wrapq.engine.record.render_run", "wrapq.engine.record.record_goals"])
def test_killed_while_it_is_recorded_is_taken_up(tmp_path, undisturbed, place):
    module, name = place.rsplit(".", 1)
    kill = f"import os, {module}; {module}.{name} = lambda *_: os._exit({signal.SIGKILL:d})"
    done = forked.wrapq(["-c", f"{kill}; from wrapq.cli import main; main({command(tmp_path)})"])
    assert done.returncode == signal.SIGKILL, done.stderr
    succeed(tmp_path, "--resume")
    assert digests(tmp_path) == undisturbed
    (folder,) = tmp_path.glob("w4a16_gptq/*")
    assert "FINISHED" in (folder / "report.html").read_text()
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".") or path.name == "resume"]


@pytest.mark.slow
@pytest.mark.parametrize("store", ["runtime.cache_gb=1", "runtime.cache_gb=0"], ids=["kept", "gathered again"])
def test_gradients_of_tokens_are_those_of_the_float_model_again(tmp_path, store):
    more = ["stack.round.gradient=true", store]
    for outputs in (tmp_path / "killed", tmp_path / "undisturbed"):
        outputs.mkdir()
    run_and_kill(tmp_path / "killed", "resume/points-2.safetensors", *more)
    assert "resumed before block" in succeed(tmp_path / "killed", "--resume", *more)
    succeed(tmp_path / "undisturbed", *more)
    assert digests(tmp_path / "killed") == digests(tmp_path / "undisturbed")


def test_changed_recipe_is_refused(tmp_path):
    run_and_kill(tmp_path, "resume/points-2.safetensors")
    other = forked.wrapq(command(tmp_path, "--resume", "stack.round.damp=0.05"))
    assert other.returncode == 4
    assert "changed since it stopped: plan" in other.stderr


def test_nothing_to_resume_says_so(tmp_path):
    result = forked.wrapq(command(tmp_path, "--resume"))
    assert result.returncode == 4
    assert "nothing to resume: no unfinished run of w4a16_gptq" in result.stderr


@pytest.mark.slow
def test_killed_before_what_pt2e_quantizes(tmp_path):
    pytest.importorskip("torchao")
    part = "rules.head={match: {name: lm_head}, quantize: true, by: pt2e, quantizer: xnnpack}"
    succeed(tmp_path / "whole", part)
    run_and_kill(tmp_path / "killed", "resume/points-2.safetensors", part)
    resumed = succeed(tmp_path / "killed", "--resume", part)
    assert re.search(r"note: resumed before block \d", resumed)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
