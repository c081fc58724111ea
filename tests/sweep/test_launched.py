"""Real sweeps of twelve jobs: the same table under every launcher, and after being killed in the middle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

import wrapq
from tests.sweep.command import AXES, TINY, finished_runs, kill_after, record, sweep, table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
LAUNCHERS = {
    "joblib": ("launcher=joblib", "launcher.jobs=2"),
    "slurm": ("launcher=slurm", "launcher.cluster=local", "launcher.jobs=2"),
    "ray": ("launcher=ray", "launcher.jobs=2"),
}
ONE = ("recipe=w4a16_gptq", "seed=3")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    outputs = tmp_path_factory.mktemp("local")
    sweep(outputs, *AXES, "tracking=none")
    rows = table(outputs)
    assert len(rows) == 12
    assert len({row["digest"] for row in rows}) == 12
    assert all(float(row["kl"]) > 0 for row in rows)
    return rows


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_same_table_under_every_launcher(launcher: str, local: list[dict[str, str]], tmp_path: Path) -> None:
    sweep(tmp_path, *AXES, "tracking=none", *LAUNCHERS[launcher])
    assert table(tmp_path) == local


def test_killed_and_started_again_it_repeats_nothing(local: list[dict[str, str]], tmp_path: Path) -> None:
    kill_after(tmp_path, 4, *AXES)
    before = set(finished_runs(tmp_path))
    again = sweep(tmp_path, *AXES)
    assert "going on with" in again.stdout
    assert table(tmp_path) == local
    runs = finished_runs(tmp_path)
    assert before < set(runs)
    assert len(runs) == 12
    assert {row["folder"] for row in record(tmp_path)["jobs"]} == {str(run) for run in runs}
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name == "wrapq"]
    recorded = client.search_runs([experiment])
    (parent,) = [run for run in recorded if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "FINISHED"
    children = [run for run in recorded if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sum(run.info.status == "FINISHED" for run in children) == 12
    assert all(run.info.status in ("FINISHED", "KILLED", "FAILED") for run in recorded)


def test_ten_runs_of_one_recipe_have_one_digest(tmp_path: Path) -> None:
    """Across processes, launchers, a resumed run and a resumed sweep."""
    digests = []
    for number in range(3):
        outputs = tmp_path / f"process{number}"
        start = [sys.executable, "-m", "wrapq", "run", *ONE, *TINY, "tracking=none", f"paths.outputs={outputs}"]
        subprocess.run(start, check=True, capture_output=True)
        digests.append(_digest(outputs))
    for number in range(2):
        outputs = tmp_path / f"library{number}"
        wrapq.run("w4a16_gptq", [*ONE[1:], *TINY, "tracking=none", f"paths.outputs={outputs}"])
        digests.append(_digest(outputs))
    for name, overrides in {"local": (), **LAUNCHERS}.items():
        sweep(tmp_path / name, *ONE, "tracking=none", *overrides)
        digests.append(_digest(tmp_path / name))
    kill_after(tmp_path / "killed", 0, *ONE, "tracking=none", block=2)
    sweep(tmp_path / "killed", *ONE, "tracking=none")
    digests.append(_digest(tmp_path / "killed"))
    assert len(digests) == 10
    assert len(set(digests)) == 1


def _digest(outputs: Path) -> tuple[str, str]:
    (run,) = finished_runs(outputs)
    found = yaml.safe_load((run / "recipe.lock.yaml").read_text())["digests"]
    return found["qparams"], found["outputs"]
