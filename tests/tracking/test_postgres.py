"""Four processes write at once to a real MLflow server on a real PostgreSQL, then four sweeps: nothing is lost."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.sweep.command import TINY, finished_runs
from tests.tracking.postgres import postgres
from tests.tracking.server import Server
from wrapq.tracking.mlflow_store import MLflowStore, load_mlflow
from wrapq.tracking.outbox import PARENT, Outbox

WRITERS, RUNS, POINTS = 4, 3, 200
PROGRAM = """
import sys
from pathlib import Path
from wrapq.tracking.mlflow import MLflowTracker
uri, folder, writer, runs, points = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
for run in range(runs):
    place = folder / f"{writer}-{run}"
    place.mkdir()
    tracker = MLflowTracker(uri, "team", folder)
    tracker.start(f"{writer}-{run}", {"writer": writer}, {f"p{i}": i for i in range(120)}, place, wait=False)
    for step in range(points):
        tracker.metrics({"m": step, "n": -step}, step)
    (place / "notes.md").write_text(f"{writer} {run}")
    tracker.artifact(place / "notes.md")
    tracker.finish()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with postgres() as database:
        made = Server(tmp_path, backend=database).start(300)
        try:
            yield made
        finally:
            made.kill()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_runs_enter_one_data_set_at_once(tmp_path: Path) -> None:
    """The database refuses the second one, which finds the row of the first when it tries again."""
    load_mlflow()
    with postgres() as uri:
        import psycopg2

        store = MLflowStore(uri, "team", tmp_path)
        store.open("run", "key", {}, 0)
        with psycopg2.connect(uri.replace("+psycopg2", "")) as other:
            rows, watch = other.cursor(), psycopg2.connect(uri.replace("+psycopg2", "")).cursor()
            (experiment,) = [e for e in store.client.search_experiments() if e.name == "team"]
            values = ("id", experiment.experiment_id, "text", "123", "wrapq", "{}")
            columns = "dataset_uuid, experiment_id, name, digest, dataset_source_type, dataset_source"
            rows.execute(f"INSERT INTO datasets ({columns}) VALUES (%s, %s, %s, %s, %s, %s)", values)
            errors: list[Exception] = []

            def enter() -> None:
                try:
                    store.call("dataset", {"name": "text", "digest": "123", "source": "x", "profile": {}, "tags": {}})
                except Exception as error:
                    errors.append(error)

            second = threading.Thread(target=enter)
            second.start()
            while second.is_alive():
                watch.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
                if watch.fetchone() != (0,):
                    break
                watch.connection.commit()
            assert second.is_alive()  # it waits for the first one, whose row it cannot see
        second.join(60)
        assert errors == []
        (found,) = store.client.get_run(store.run_id).inputs.dataset_inputs
        assert (found.dataset.name, found.dataset.digest) == ("text", "123")
        store.client._tracking_client.store.engine.dispose()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_writers_at_once(server: Server, tmp_path: Path) -> None:
    start = time.perf_counter()
    writers = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, server.uri, str(tmp_path), f"w{i}", str(RUNS), str(POINTS)])
        for i in range(WRITERS)
    ]
    assert [writer.wait(600) for writer in writers] == [0] * WRITERS
    check(server.uri, tmp_path, time.perf_counter() - start)


def check(uri: str, folder: Path, seconds: float) -> None:
    client = MlflowClient(tracking_uri=uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "team"]
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == sorted(f"w{i}-{j}" for i in range(WRITERS) for j in range(RUNS))
    sent = found = 0
    for run in runs:
        outbox = Outbox(folder / run.info.run_name)
        assert (outbox.sent().count, outbox.sent().rejected) == (outbox.count(), [])
        assert run.info.status == "FINISHED"
        assert len(run.data.params) == 120
        for key, sign in (("m", 1), ("n", -1)):
            points = client.get_metric_history(run.info.run_id, key)
            assert [(p.step, p.value) for p in points] == [(i, sign * i) for i in range(POINTS)]
            found += len(points)
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["notes.md"]
        sent += outbox.count()
    expected = WRITERS * RUNS * POINTS * 2
    print(f"\n{len(runs)} runs, {sent} records sent, {found} of {expected} points found, {seconds:.1f} s")
    assert found == expected


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_sweeps_at_once(server: Server, tmp_path: Path) -> None:
    """Two jobs each, in folders of their own; all that they kept on disk is in the database."""
    axes = ["recipe=w4a16_gptq", "rules.linear.weight.group_size=64,128", *TINY, f"tracking.uri={server.uri}"]
    sweeps = [
        subprocess.Popen([sys.executable, "-m", "wrapq", "sweep", *axes, f"paths.outputs={tmp_path}/s{i}"])
        for i in range(WRITERS)
    ]
    assert [sweep.wait(1500) for sweep in sweeps] == [0] * WRITERS
    client, sent = MlflowClient(tracking_uri=server.uri), 0
    (experiment,) = [e for e in client.search_experiments() if e.name == "wrapq"]
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    for i in range(WRITERS):
        (parent,) = (Outbox(path.parent) for path in (tmp_path / f"s{i}").glob("sweep/*/sweep.json"))
        jobs = [Outbox(path) for path in finished_runs(tmp_path / f"s{i}")]
        assert len(jobs) == 2
        for outbox in (parent, *jobs):
            assert (outbox.sent().count, outbox.sent().rejected) == (outbox.count(), [])
            run = runs.pop(outbox.sent().run_id)
            assert run.info.status == "FINISHED"
            assert run.data.tags.get(PARENT) == (None if outbox is parent else parent.sent().run_id)
            sent += outbox.count()
    assert not runs
    print(f"\n{WRITERS} sweeps of two jobs, {sent} records sent and found")
