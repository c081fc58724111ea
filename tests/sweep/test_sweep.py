"""A real sweep in this process: its record, what it shares, what it does not do again, and how it ends."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.sweep.command import TINY, finished_runs
from wrapq.cli import main
from wrapq.engine.progress import Progress
from wrapq.engine.run import execute
from wrapq.errors import WrapqError
from wrapq.recipe.compose import compose
from wrapq.resolve.resolve import resolve
from wrapq.sweep import run_job
from wrapq.sweep.driver import SweepResult, sweep
from wrapq.sweep.job import SweepError

AXES = ("recipe=w4a16_gptq", "rules.linear.weight.group_size=64,128", "calibration.schedule=parallel")
RTN = ("recipe=w4a16_rtn", *(text for text in TINY if not text.startswith("calibration")), "tracking=none")


def tracked(outputs: Path) -> list[Run]:
    client = MlflowClient(tracking_uri=f"sqlite:///{outputs}/mlflow.db")
    experiment = client.get_experiment_by_name("wrapq")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


def children(runs: list[Run], parent: str | None) -> list[Run]:
    return [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]


def command(*overrides: str) -> Result:
    return CliRunner().invoke(main, ["sweep", *overrides])


@dataclass
class Two:
    """Two jobs, and the same two again."""

    outputs: Path
    first: SweepResult
    again: SweepResult
    senders: int  # processes that sent their records


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[Path], None]) -> Two:
    outputs = tmp_path_factory.mktemp("outputs")
    new_store(outputs / "mlflow.db")
    overrides = [*AXES, *TINY, f"paths.outputs={outputs}"]
    goals = ["goals.bits_per_weight=4.3", "goals.perplexity_increase=50%"]
    started, popen = [], subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda command, **how: started.append(command) or popen(command, **how))
        first, again = sweep([*overrides, *goals]), sweep(overrides)
    return Two(outputs, first, again, sum("wrapq.tracking.worker" in command for command in started))


def test_the_record_is_a_run_with_a_child_for_each_job(two: Two) -> None:
    runs = tracked(two.outputs)
    parent = next(run for run in runs if run.info.run_id == two.first.run_id)
    mine = children(runs, parent.info.run_id)
    assert [run.info.status for run in (parent, *mine)] == ["FINISHED"] * 3
    assert {run.data.tags["sweep.rules.linear.weight.group_size"] for run in mine} == {"64", "128"}
    assert {run.data.tags["mlflow.runName"] for run in mine} == {
        "rules.linear.weight.group_size=64",
        "rules.linear.weight.group_size=128",
    }
    assert {run.info.run_id for run in mine} == {row.outcome.run_id for row in two.first.table.rows}
    client = MlflowClient(tracking_uri=f"sqlite:///{two.outputs}/mlflow.db")
    assert {"table.csv", "sweep.json", "pareto.png", "report.html"} <= {
        file.path for file in client.list_artifacts(parent.info.run_id)
    }


def test_the_winner_and_the_goals_are_on_record(two: Two) -> None:
    winner = two.first.table.winner
    assert winner is not None
    assert winner.values == {"rules.linear.weight.group_size": "128"}  # 4.25 bits; groups of 64 take 4.5
    runs = {run.info.run_id: run for run in tracked(two.outputs)}
    parent = runs[two.first.run_id].data
    assert parent.tags["winner.rules.linear.weight.group_size"] == "128"
    assert parent.tags["winner.run_id"] == winner.outcome.run_id
    assert parent.tags["winner.rule"] == "lowest kl among the jobs that meet all goals"
    assert parent.metrics["winner/kl"] == winner.outcome.figures["kl"]
    said = [runs[row.outcome.run_id].data.tags["goals"] for row in two.first.table.rows]
    assert said == ["missed", "met"]
    missed = runs[two.first.table.rows[0].outcome.run_id].data
    assert missed.metrics["goal/bits_per_weight"] == 4.5
    assert missed.metrics["goals_missed"] == 1
    status = json.loads((Path(two.first.table.rows[0].outcome.folder) / "run.json").read_text())
    assert status["goals"]["bits_per_weight"] == {"bound": 4.3, "value": 4.5, "met": False, "survival": False}


def test_the_folder_holds_table_plot_and_record(two: Two) -> None:
    said = json.loads((two.first.folder / "sweep.json").read_text())
    assert said["status"] == "FINISHED"
    assert said["winner"] == 2
    assert said["run_id"] == two.first.run_id
    with (two.first.folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["kl"]) for row in rows] == [row.outcome.figures["kl"] for row in two.first.table.rows]
    assert [row["folder"] for row in rows] == [job["folder"] for job in said["jobs"]]
    page = (two.first.folder / "report.html").read_text()
    assert "lowest kl among the jobs that meet all goals" in page
    assert all(job["winner"] or "missed" in page for job in said["jobs"])
    assert (two.first.folder / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_the_jobs_share_statistics(two: Two) -> None:
    runs = {run.info.run_id: run.data.metrics for run in tracked(two.outputs)}
    first, second = (runs[row.outcome.run_id] for row in two.first.table.rows)
    assert first["cache/hits"] == 0
    assert second["cache/misses"] == 0
    assert second["cache/hits"] == first["cache/misses"] > 0


def test_one_process_sends_the_records_of_a_sweep(two: Two) -> None:
    assert two.senders == 2
    assert len(tracked(two.outputs)) == 6, "two sweeps of two jobs"


def test_a_job_gives_what_it_would_give_alone(two: Two, tmp_path: Path) -> None:
    first, second = (row.outcome for row in two.first.table.rows)
    seconds = json.loads((Path(first.folder) / "run.json").read_text())["seconds"]
    steps = sum(value for name, value in seconds.items() if name != "total")
    assert 0 < seconds["calibrate"] < steps <= seconds["total"] == first.figures["seconds"]
    overrides = [*AXES[:1], "rules.linear.weight.group_size=128", AXES[2], *TINY, f"paths.outputs={tmp_path}"]
    composed = compose([*overrides, "tracking=none"])
    alone = execute(resolve(composed.recipe, composed.sources), composed.settings, Progress())
    assert alone.digests == json.loads((Path(second.folder) / "run.json").read_text())["digests"]


def test_what_an_earlier_run_did_is_not_done_again(two: Two) -> None:
    assert [row.outcome.status for row in two.again.table.rows] == ["reused", "reused"]
    assert len(finished_runs(two.outputs)) == 2
    for before, after in zip(two.first.table.rows, two.again.table.rows, strict=True):
        assert after.outcome.folder == before.outcome.folder
        assert after.outcome.figures == before.outcome.figures
        assert after.outcome.goals == {}  # the second sweep had none
    stand_ins = children(tracked(two.outputs), two.again.run_id)
    assert {run.data.tags["reused"] for run in stand_ins} == {row.outcome.folder for row in two.first.table.rows}
    kept = {run.data.metrics["quantized/kl"] for run in stand_ins}
    assert kept == {row.outcome.figures["kl"] for row in two.first.table.rows}


def test_a_failed_job_does_not_stop_the_others_and_is_tried_again(tmp_path: Path) -> None:
    short, text = tmp_path / "short.txt", tmp_path / "text.txt"
    short.write_text("Less than one window.")
    text.write_text("Quantization maps real numbers to a grid. " * 200)
    outputs = tmp_path / "outputs"
    overrides = (*RTN, "evaluation=text", f"evaluation.path={short},{text}", f"paths.outputs={outputs}")
    result = command(*overrides)
    assert result.exit_code == 11
    assert "job 1 failed: " in result.output
    assert "winner: job 2" in result.output
    text.write_text("Another text is another lock. " * 200)
    short.write_text("Now it is long enough. " * 200)
    result = command(*overrides)
    assert result.exit_code == 0
    assert "done before" not in result.output
    assert len(finished_runs(outputs)) == 3


def interrupt_at(call: int) -> Callable:
    """`execute`, interrupted at one of its calls once the run has its folder."""
    calls = []

    def interrupted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return execute(*args, **kwargs)

    return interrupted


def test_interrupted_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = (*RTN, "rules.linear.weight.group_size=64,128", f"paths.outputs={tmp_path}")
    monkeypatch.setattr(run_job, "execute", interrupt_at(2))
    result = command(*overrides)
    assert result.exit_code == 130
    assert "1 of 2 jobs are done; the same command goes on from here" in result.output
    (path,) = tmp_path.glob("sweep/*/sweep.json")
    assert json.loads(path.read_text())["status"] == "INTERRUPTED"
    monkeypatch.undo()
    result = command(*overrides)
    assert result.exit_code == 0
    assert f"going on with {path.parent}" in result.output
    said = json.loads(path.read_text())
    assert [job["status"] for job in said["jobs"]] == ["finished"] * 2
    assert len(finished_runs(tmp_path)) == 2


def test_two_jobs_that_are_the_same_are_done_once(tmp_path: Path) -> None:
    result = sweep([*RTN, "rules.linear.weight.group_size=128,128", "description=a,b", f"paths.outputs={tmp_path}"])
    first, second = result.table.rows
    assert first.outcome == second.outcome
    assert len(finished_runs(tmp_path)) == 1
    assert result.run_id is None


@pytest.mark.slow
def test_optuna_runs_the_jobs_it_chooses(tmp_path: Path) -> None:
    axes = ("rules.linear.weight.group_size=64,128", "rules.linear.weight.observer=minmax,mse")
    result = command(*RTN, *axes, "sweep=optuna", "sweep.trials=3", "goals.kl=1e-9", f"paths.outputs={tmp_path}")
    assert result.exit_code == 10
    assert "no winner: no job meets all goals" in result.output
    assert "goal kl: at most 0.00000: met by 0 of 3 jobs" in result.output
    (path,) = tmp_path.glob("sweep/*/sweep.json")
    tried = json.loads(path.read_text())["jobs"]
    assert [job["job"] for job in tried] == [1, 2, 3]
    assert {job["rules.linear.weight.group_size"] for job in tried} <= {"64", "128"}
    assert (path.parent / "study.log").is_file()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("sweep.minimize=kll",), "sweep.minimize=kll: unknown figure to minimize 'kll'\n    did you mean: kl"),
        (("sweep.minimize=top1_agreement",), "unknown figure to minimize 'top1_agreement'"),
        (("sweep.minimize=export_token_ms.onnx",), "is of the export to onnx, and no job makes one"),
        (("sweep.sampler=gird",), "sweep.sampler: unknown sampler 'gird'\n    did you mean: grid"),
        (("sweep.trials=3",), "sweep.trials: sampler grid has no option 'trials'"),
        (("launcher.kind=slrum",), "unknown launcher 'slrum'"),
        (("seed=1,2", "rules.linear.weight.group_size=48"), "all 2 jobs: "),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(overrides: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(SweepError) as caught:
        sweep([*RTN, *overrides, f"paths.outputs={tmp_path}/outputs"])
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_under_torchrun_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(WrapqError, match="not under torchrun"):
        sweep([*RTN, f"paths.outputs={tmp_path}"])


@pytest.mark.parametrize(("goal", "status", "said"), [("50%", 0, "met"), ("-50%", 10, "missed")])
def test_a_run_ends_as_its_goals_say(goal: str, status: int, said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["run", *RTN, f"goals.perplexity_increase={goal}", f"paths.outputs={tmp_path}"])
    assert result.exit_code == status, result.output
    assert f"goal perplexity_increase: at most {goal.rstrip('%')}.00 %, reached" in result.output
    assert f": {said}" in result.output
