"""Packages of one file each, those of docs/extending.md, installed together: they are wherever wrapq's own are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.engine.record import recorded
from tests.installed import Interpreter, write_package
from tests.readme.test_readme import BLOCK, ROOT

DATA = ["calibration.source=counting", "~calibration.split", "calibration.sentences=60", "calibration.samples=4"]
SMALL = [
    *DATA,
    "calibration.seq_len=64",
    "evaluation.tokens=512",
    "evaluation.seq_len=128",
    "runtime.kernels=reference",
]
STACK = {"spread": "even", "ranges": "headroom", "round": "stochastic", "mend": "half_mean"}
ACTIVATIONS = {
    "defaults": [{"/scheme@rules.linear": "w8a8_static"}, "_self_"],
    "name": "team",
    "rules": {
        "linear": {"match": {"type": "Linear"}, "input": {"observer": "three_quarters"}},
        "head": {"match": {"name": "lm_head"}, "quantize": False},
    },
    "stack": {name: {"algorithm": algorithm} for name, algorithm in STACK.items()},
}
WEIGHTS = {
    "defaults": [{"/scheme@rules.linear": "w4a16"}, "_self_"],
    "name": "blocks",
    "rules": {"linear": {"match": {"name": "*.mlp.*"}}},
    "stack": {"round": {"algorithm": "narrower", "shares": [1.0, 0.9]}},
    "export": {"dequantized": {"beside_float": False}},
    "goals": {"cosine": 0.5},
}


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path with every plug-in of the page as an installed package, and two recipes that use them."""
    folder = tmp_path_factory.mktemp("team")
    for language, path, text in BLOCK.findall((ROOT / "docs" / "extending.md").read_text(encoding="utf-8")):
        if language == "python" and path:
            (folder / path).write_text(text, encoding="utf-8")
            write_package(folder, Path(path).stem, {"wrapq.plugins": {Path(path).stem: Path(path).stem}})
    for recipe in (ACTIVATIONS, WEIGHTS):
        text = "# @package _global_\n" + yaml.safe_dump(recipe, sort_keys=False)
        (folder / f"{recipe['name']}.yaml").write_text(text)
    return folder


Wrapq = Callable[..., str]


@pytest.fixture(scope="module")
def wrapq(team: Path) -> Iterator[Wrapq]:
    """Runs a command of wrapq where the packages are installed: what it prints."""
    with Interpreter(team) as interpreter:

        def run(*arguments: str, status: int = 0) -> str:
            ended, said = interpreter.wrapq(*arguments)
            assert ended == status, f"{arguments}\n{said[-3000:]}"
            return said

        yield run


@pytest.fixture(scope="module")
def run_folder(team: Path, wrapq: Wrapq, new_store: Callable[[Path], None]) -> Path:
    """A run with a transform, a range setter, a rounder, a corrector, an observer, a source and a metric."""
    new_store(team / "runs.db")
    wrapq("run", "recipe=team.yaml", *SMALL, "tracking.uri=sqlite:///runs.db", "paths.outputs=a")
    (found,) = (team / "a" / "team").iterdir()
    return found


def test_the_plan_names_them(wrapq: Wrapq) -> None:
    shown = wrapq("plan", "recipe=team.yaml", *SMALL)
    for name in (*STACK.values(), "three_quarters"):
        assert name in shown


def test_a_wrong_option_is_told_like_any_other(wrapq: Wrapq) -> None:
    shown = wrapq("plan", "recipe=team.yaml", *SMALL, "stack.ranges.facter=2", status=2)
    assert "headroom has no option 'facter'" in shown and "did you mean: factor" in shown
    assert "goals.cosin" in wrapq("plan", "recipe=team.yaml", *SMALL, "goals.cosin=0.5", status=2)


def test_an_exporter_refuses_in_the_plan(wrapq: Wrapq) -> None:
    shown = wrapq("plan", "recipe=team.yaml", *SMALL, "+export.dequantized={}", status=2)
    assert "a float checkpoint has no activations" in shown


def test_the_run_page_and_mlflow_have_the_metric(team: Path, run_folder: Path) -> None:
    lock = yaml.safe_load((run_folder / "recipe.lock.yaml").read_text())
    cosine = lock["metrics"]["quantized"]["cosine"]
    assert 0.5 < cosine <= 1
    page = (run_folder / "report.html").read_text()
    assert "cosine" in page and f"{cosine:.4f}" in page
    tracked = recorded(team / "runs.db")
    assert tracked.data.metrics["quantized/cosine"] == pytest.approx(cosine)
    assert tracked.data.params["stack.ranges.algorithm"] == "headroom"
    assert tracked.data.params["calibration.source"] == "counting"
    reports = json.loads((run_folder / "modules.json").read_text())
    assert any("largest_factor" in name for name in tracked.data.metrics) and reports


def test_block_rounder_exporter_goal_sweep_and_comparison(team: Path, wrapq: Wrapq, run_folder: Path) -> None:
    shown = wrapq(
        "sweep",
        "recipe=blocks.yaml",
        *SMALL,
        "tracking=none",
        "paths.outputs=a",
        "rules.linear.weight.group_size=64,128",
    )
    assert "goal cosine: at least 0.5000: met by 2 of 2 jobs" in shown
    jobs = sorted((team / "a" / "blocks").iterdir())
    assert all((job / "export" / "dequantized" / "model.safetensors").is_file() for job in jobs)
    assert any("share" in report for report in json.loads((jobs[0] / "modules.json").read_text()).values())
    table = next((team / "a" / "sweep").rglob("table.csv")).read_text()
    assert "cosine" in table.splitlines()[0]
    compared = wrapq("compare", str(run_folder), str(jobs[0]))
    assert "cosine" in compared
