"""What is recorded, where one process sends the records of many runs, as in a sweep: to import MLflow takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tracking.local import client
from wrapq.tracking.base import TrackingError
from wrapq.tracking.mlflow import MLflowTracker
from wrapq.tracking.names import entity_key
from wrapq.tracking.process import one_process


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[Path], None]) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("outputs")
    new_store(folder / "mlflow.db")
    with one_process():
        yield folder


def test_no_secret_is_recorded(tracker: MLflowTracker, outputs: Path, tmp_path: Path) -> None:
    tracker.start(
        "x", {"uri": "https://me:hunter22@host/"}, {"hub": {"token": "hunter22"}, "tokenizer": "demo"}, tmp_path
    )
    tracker.text("recipe.yaml", "hub: {token: hunter22}\ntracking: {uri: 'https://me:hunter22@host'}\n")
    tracker.dataset("d", "0", "s3://me:hunter22@bucket", "calibration", {"password": "hunter22", "samples": 3})
    tracker.finish("FAILED", "cannot reach https://me:hunter22@host")
    assert tracker.problems == []
    run = client(outputs).get_run(tracker.run_id)
    assert run.data.params == {"hub.token": "[redacted]", "tokenizer": "demo"}
    assert "hunter22" not in str(run.to_dictionary())
    written = (outputs / "mlartifacts" / tracker.run_id / "artifacts" / "recipe.yaml").read_text()
    assert "hunter22" not in written


def test_long_values_are_cut_and_say_so(tracker: MLflowTracker, outputs: Path, tmp_path: Path) -> None:
    tracker.start("x", {"long": "t" * 9000}, {"long": "p" * 7000, "k" * 300: 1, "odd!key": 2, "../up": 3}, tmp_path)
    tracker.finish()
    assert tracker.problems == []
    run = client(outputs).get_run(tracker.run_id)
    assert run.data.params["long"].endswith("p ... [cut, 7000 characters]")
    assert run.data.tags["long"].endswith("t ... [cut, 9000 characters]")
    assert {"odd_key", "up", entity_key("k" * 300)} < set(run.data.params)


@pytest.mark.parametrize(
    "error, status, reason",
    [
        pytest.param(None, "FINISHED", None, marks=pytest.mark.slow),
        (ValueError("bad weights"), "FAILED", "ValueError: bad weights"),
        (KeyboardInterrupt(), "KILLED", "interrupted"),
    ],
)
def test_as_a_context_manager(tracker: MLflowTracker, outputs: Path, tmp_path: Path, error, status, reason) -> None:
    def body() -> None:
        with tracker:
            tracker.start("x", {}, {}, tmp_path)
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(type(error)):
            body()
    run = client(outputs).get_run(tracker.run_id)
    assert run.info.status == status
    assert run.data.tags.get("failure") == reason


def test_trouble_after_the_start_is_remembered_not_raised(
    tracker: MLflowTracker, outputs: Path, tmp_path: Path
) -> None:
    tracker.start("x", {}, {"a": 1}, tmp_path)
    tracker.params({"a": 2})  # MLflow refuses to change a parameter
    tracker.artifact(tmp_path / "nowhere.txt")
    tracker.metrics({"late": 1.0})
    tracker.finish()
    tracker.metrics({"later": 1.0})
    late, *rejected = reversed(tracker.problems)
    assert late == "metrics after the run was finished"
    assert len(rejected) == 2
    assert any(problem.startswith("params: ") for problem in rejected)
    assert any("nowhere.txt" in problem for problem in rejected)
    run = client(outputs).get_run(tracker.run_id)
    assert run.data.params == {"a": "1"}
    assert run.data.metrics == {"late": 1.0}
    assert run.info.status == "FINISHED"


def test_started_without_waiting(tracker: MLflowTracker, outputs: Path, tmp_path: Path) -> None:
    tracker.start("x", {}, {"a": 1}, tmp_path, wait=False)
    tracker.metrics({"m": 1.0})
    tracker.finish()
    run = client(outputs).get_run(tracker.run_id)
    assert (run.data.params, run.data.metrics, run.info.status) == ({"a": "1"}, {"m": 1.0}, "FINISHED")


def test_a_run_starts_once(tracker: MLflowTracker, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="has not been started"):
        tracker.ready()
    tracker.start("x", {}, {}, tmp_path)
    with pytest.raises(TrackingError, match="started before"):
        tracker.start("x", {}, {}, tmp_path)
