"""The folder of a run: what a finished one holds, and that files in it are whole or absent."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import wrapq
from tests.engine.record import partial_files, status
from wrapq.engine.record import RunResult
from wrapq.errors import ModelError, OutputError
from wrapq.recipe.compose import compose
from wrapq.resolve.plan import Plan
from wrapq.runs.checkpoint import qparams_tensors, tensors_digest
from wrapq.runs.folder import RunFolder

OF_THE_RUN = {
    *("run.json", "recipe.yaml", "plan.json", "recipe.lock.yaml", "log.txt", "modules.json"),
    *("qparams.safetensors", "statistics.safetensors"),
}
OF_THE_MODEL = {"model.safetensors", "manifest.json", "config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_finished_run_holds_all_of_it(finished: RunResult) -> None:
    assert {path.name for path in finished.folder.iterdir()} >= OF_THE_RUN | OF_THE_MODEL
    assert not partial_files(finished.folder)
    assert not (finished.folder / "resume").exists()
    assert finished.folder.parent.name == "demo"


def test_no_file_can_run_code(finished: RunResult) -> None:
    kinds = {path.suffix for path in finished.folder.iterdir() if path.is_file()}
    assert kinds == {".json", ".yaml", ".safetensors", ".txt", ".html"}
    assert "<script" not in (finished.folder / "report.html").read_text(encoding="utf-8")


def test_others_may_read_what_they_may_see(finished: RunResult) -> None:
    modes = {path.stat().st_mode & 0o666 for path in finished.folder.iterdir()}
    assert modes == {finished.folder.stat().st_mode & 0o666}


def test_run_json_says_how_it_ended(finished: RunResult) -> None:
    said = status(finished.folder)
    assert (said["status"], said["recipe"], said["notes"]) == ("FINISHED", "demo", [])
    assert said["stages"] == finished.metrics
    assert said["sizes"] == finished.sizes
    assert said["digests"] == finished.digests


def test_recipe_yaml_is_a_recipe_with_the_same_digest(finished: RunResult) -> None:
    again = compose([f"recipe={finished.folder / 'recipe.yaml'}"]).recipe
    assert again.digest() == finished.digests["recipe"]


def test_plan_json_is_the_plan(finished: RunResult) -> None:
    plan = Plan.model_validate_json((finished.folder / "plan.json").read_text())
    assert plan.digest() == finished.digests["plan"]


def test_qparams_are_those_of_the_model(finished: RunResult) -> None:
    tensors = load_file(finished.folder / "qparams.safetensors")
    assert tensors_digest(tensors) == finished.digests["qparams"]
    assert tensors_digest(qparams_tensors(wrapq.load(finished.folder))) == finished.digests["qparams"]


def test_statistics_are_of_the_calibrated_points(finished: RunResult) -> None:
    plan = Plan.model_validate_json((finished.folder / "plan.json").read_text())
    (ranges,) = [stage for stage in plan.stages if stage.algorithm == "ranges"]
    statistics = load_file(finished.folder / "statistics.safetensors")
    assert {name.rpartition(".")[0] for name in statistics} == set(ranges.targets)


def test_modules_json_has_the_error_of_every_weight(finished: RunResult) -> None:
    reports = json.loads((finished.folder / "modules.json").read_text())
    plan = Plan.model_validate_json((finished.folder / "plan.json").read_text())
    assert reports.keys() == {f"{m.name}.{p.name}" for m in plan.modules for p in m.points if p.role == "weight"}
    assert all(report["weight_sqnr_db"] > 10 for report in reports.values())


def test_the_log_tells_the_steps(finished: RunResult) -> None:
    lines = (finished.folder / "log.txt").read_text().splitlines()
    steps = [
        "Reading data",
        "Loading the model",
        "Calibrating",
        "Measuring quality",
        "Converting",
        "Saving and checking",
    ]
    for step, line in zip(steps, lines, strict=False):
        assert f"INFO    wrapq.engine.context: {step}" in line


def test_the_lock_repeats_recipe_and_results(finished: RunResult) -> None:
    lock = yaml.safe_load((finished.folder / "recipe.lock.yaml").read_text())
    assert lock["digests"].items() >= finished.digests.items()
    assert lock["recipe"] == yaml.safe_load((finished.folder / "plan.json").read_text())["recipe"]


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(name: str, finished: RunResult, tmp_path: Path) -> None:
    for path in finished.folder.iterdir():
        if path.name != name:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ModelError, match=str(tmp_path)):
        wrapq.load(tmp_path)


# --- writing


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    folders = {RunFolder.create(tmp_path, "demo", 0).path for _ in range(3)}
    assert len(folders) == 3
    assert {path.parent for path in folders} == {tmp_path / "demo"}
    assert not partial_files(tmp_path)


def test_a_failing_write_keeps_what_was_there_before(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_text("a.txt", "first")

    def fail(path: Path) -> None:
        path.write_text("half of the sec")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"^cannot write .*/a\.txt: the disk is full$"):
        folder.write("a.txt", fail)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["first"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def stop(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path).write("a.txt", stop)
    assert not list(tmp_path.iterdir())


def test_files_written_together_are_all_there_or_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def save(path: Path) -> None:
        (path / "a.json").write_text("{}")
        (path / "b.json").write_text("{}")

    def fail(path: Path) -> None:
        save(path)
        raise RuntimeError("No space left on device (os error 28)")  # as tokenizers words it

    with pytest.raises(OutputError, match=rf"^cannot write {tmp_path}: the disk is full$"):
        folder.write_files(fail)
    assert not list(tmp_path.iterdir())
    folder.write_files(save)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json"}


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        RunFolder(tmp_path).write("a.txt", fail)


def test_all_or_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="x"), folder.all_or_none("a.txt", "never.txt"):
        folder.write_text("a.txt", "a")
        folder.write_text("b.txt", "b")
        raise ValueError("x")
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]


def test_the_log_of_one_run_is_not_in_the_next(tmp_path: Path) -> None:
    folders = [RunFolder.create(tmp_path, "demo", 0) for _ in range(2)]
    before = logging.getLogger("wrapq").level
    for number, folder in enumerate(folders):
        with folder.log():
            logging.getLogger("wrapq.test").info("run %d", number)
    assert [(folder.path / "log.txt").read_text().split(": ")[1] for folder in folders] == ["run 0\n", "run 1\n"]
    assert logging.getLogger("wrapq").level == before
