"""Runs are found by folder, recipe, MLflow id and what they did; their files are read, or named when damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from wrapq.engine.record import RunResult
from wrapq.errors import ModelError
from wrapq.resolve.plan import Plan
from wrapq.runs.folder import LOCK, MANIFEST, MODULES, PLAN, STATUS_FILE
from wrapq.runs.run_record import RunRecord, find_equal, find_lock, find_run, find_unfinished, list_runs

DAYS = ("2026-01-01_00-00-00", "2026-01-02_00-00-00", "2026-01-03_00-00-00")


def begun(outputs: Path, name: str, **facts: object) -> Path:
    folder = outputs / name
    folder.mkdir(parents=True)
    (folder / STATUS_FILE).write_text(json.dumps(facts))
    return folder


def test_a_run_is_found_by_folder_recipe_and_newest(tmp_path: Path) -> None:
    folders = [begun(tmp_path, f"first/{day}") for day in DAYS]
    newest = folders[1]
    for folder in folders[:2]:
        (folder / MANIFEST).write_text("{}")
    assert find_run("first", tmp_path) == find_run(str(newest), tmp_path) == find_run(str(tmp_path / "first"), tmp_path)
    assert find_run("first", tmp_path).folder == newest and find_run("first", tmp_path).name == "first"
    assert find_lock("first", tmp_path) == newest / LOCK
    assert find_lock("my.yaml", tmp_path) == Path("my.yaml")
    with pytest.raises(ModelError, match=r"frst is neither .*; did you mean: first"):
        find_run("frst", tmp_path)
    with pytest.raises(ModelError, match="holds no finished run"):
        find_run("first", tmp_path / "none")
    with pytest.raises(ModelError, match="is neither the folder"):
        find_run("x" * 5000, tmp_path)


def test_a_run_is_found_by_its_mlflow_id_beside_damaged_ones(tmp_path: Path) -> None:
    wanted = begun(tmp_path, f"first/{DAYS[0]}", run_id="a" * 32)
    begun(tmp_path, f"first/{DAYS[1]}", run_id="a" * 32)  # without a model
    for folder in (wanted, damaged := begun(tmp_path, f"second/{DAYS[2]}")):
        (folder / MANIFEST).write_text("{}")
    (damaged / STATUS_FILE).write_text("not json")
    assert find_run("a" * 32, tmp_path).folder == wanted
    with pytest.raises(ModelError, match="neither"):
        find_run("b" * 32, tmp_path)


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    for name in (f"b/{DAYS[0]}", f"a/{DAYS[2]}", f"b/{DAYS[1]}"):
        begun(tmp_path, name)
    assert [run.folder.name for run in list_runs(tmp_path)] == [*reversed(DAYS)]
    assert [run.folder.name for run in list_runs(tmp_path, "b")] == [DAYS[1], DAYS[0]]
    assert not list(list_runs(tmp_path / "none"))


def test_the_newest_unfinished_run_that_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing to resume: no unfinished run of first under .* got past its first"):
        find_unfinished(tmp_path, "first")
    states = {DAYS[0]: "RUNNING", DAYS[1]: "FAILED", DAYS[2]: "FINISHED"}
    folders = [begun(tmp_path, f"first/{day}", status=status) for day, status in states.items()]
    for folder in (folders[0], folders[2]):
        (folder / "resume").mkdir()
        (folder / "resume" / "state.json").write_text("{}")
    assert find_unfinished(tmp_path, "first").folder == folders[0]  # the second never got past its first block


def test_a_finished_run_is_read(finished: RunResult) -> None:
    run = RunRecord(finished.folder).read()
    assert run.status == "FINISHED" and run.has_model and not run.resumable
    assert run.plan.recipe.name == "demo"
    assert run.digests == finished.digests and run.lock.digests.items() >= finished.digests.items()
    assert run.figures == finished.figures and run.measured.stages == finished.metrics
    assert set(run.weights) <= {f"{module.name}.weight" for module in run.plan.modules}
    assert "layer/relative_error" in run.curves


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (STATUS_FILE, "{", r"run\.json cannot be read: "),
        (STATUS_FILE, "[]", r"run\.json does not hold what a run writes"),
        (STATUS_FILE, "{}", r"is not the folder of a finished run: KeyError\('stages'\) in run\.json"),
        (PLAN, "{}", r"plan\.json cannot be read as a plan: "),
        (MODULES, "", r"modules\.json cannot be read: "),
        (LOCK, "recipe: 1", r"recipe\.lock\.yaml is no lock of a run: recipe"),
        (LOCK, None, r"recipe\.lock\.yaml cannot be read: No such file"),
    ],
)
def test_a_damaged_file_is_named(finished: RunResult, tmp_path: Path, name: str, text: str | None, said: str) -> None:
    for file in (STATUS_FILE, PLAN, MODULES, LOCK, MANIFEST):
        shutil.copy(finished.folder / file, tmp_path / file)
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=said):
        RunRecord(tmp_path).read()


def test_the_run_that_did_the_same_is_found_and_inputs_read_only_for_it(finished: RunResult, outputs: Path) -> None:
    run = RunRecord(finished.folder)
    now = {name: run.digests[name] for name in ("model", "evaluation")}
    read: list[Plan] = []

    def inputs() -> dict[str, str]:
        read.append(run.plan)
        return now

    assert find_equal(outputs, run.plan, None, inputs) == run and len(read) == 1
    now["evaluation"] = "another text"
    assert find_equal(outputs, run.plan, None, inputs) is None and len(read) == 2
    other = run.plan.model_copy(update={"recipe": run.plan.recipe.model_copy(update={"seed": 7})})
    assert find_equal(outputs, other, None, inputs) is None and len(read) == 2
    (lock := run.folder / LOCK).rename(run.folder / "away")
    try:
        assert find_equal(outputs, run.plan, None, inputs) is None and len(read) == 2
    finally:
        (run.folder / "away").rename(lock)
