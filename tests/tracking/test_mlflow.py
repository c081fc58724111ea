"""The MLflow tracker on real stores: what is recorded reads back, nothing later than the start can stop a run."""

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import pytest
import sqlalchemy

from tests.tracking.local import client, settings
from wrapq.tracking.base import Tracker, TrackingError
from wrapq.tracking.mlflow import MLflowTracker, make_tracker
from wrapq.tracking.process import one_process
from wrapq.tracking.stores import store_uri, ui_command
from wrapq.tracking.sync import sync


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[Path], None]) -> Path:
    folder = tmp_path_factory.mktemp("out puts")  # with a space: addresses must stand it
    new_store(folder / "mlflow.db")
    return folder


def test_a_whole_run_reads_back(tracker: MLflowTracker, outputs: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: demo\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    tracker.start(
        "demo", {"recipe": "demo"}, {"model": {"dtype": "float32"}, "stack_order": ["a", "b"], "seed": 0}, tmp_path
    )
    tracker.params({f"many.{i}": i for i in range(250)})
    tracker.tags({"data_digest": "d" * 64})
    tracker.metrics({"float/perplexity": 12.5, "odd": math.nan})
    tracker.metrics({"loss": 1.0}, step=3)
    tracker.curves({"sqnr_db": [30.0, 20.0, 10.0], "long": [0.5] * 1500})
    tracker.dataset("demo/calib", "d" * 64, "demo/calib", "calibration", {"samples": 64, "tokens": 4096})
    tracker.artifact(tmp_path / "recipe.yaml")
    tracker.artifact(tmp_path / "folder")
    tracker.artifact(tmp_path / "recipe.yaml", "again")
    tracker.text("report/notes.txt", "fine")
    tracker.finish()
    assert tracker.problems == []
    seen = client(outputs)
    run = seen.get_run(tracker.run_id)
    assert tracker.run_url is None
    assert (run.info.run_name, run.info.status) == ("demo", "FINISHED")
    assert len(run.data.params) == 253
    assert run.data.params["model.dtype"] == "float32"
    assert run.data.params["stack_order"] == '["a", "b"]'
    assert run.data.tags["recipe"] == "demo"
    assert run.data.metrics["float/perplexity"] == 12.5
    assert math.isnan(run.data.metrics["odd"])
    assert [(m.step, m.value) for m in seen.get_metric_history(tracker.run_id, "loss")] == [(3, 1.0)]
    curve = seen.get_metric_history(tracker.run_id, "sqnr_db")
    assert [(m.step, m.value) for m in curve] == [(0, 30.0), (1, 20.0), (2, 10.0)]
    assert len(seen.get_metric_history(tracker.run_id, "long")) == 1500
    (data,) = run.inputs.dataset_inputs
    assert {t.key: t.value for t in data.tags} == {"mlflow.data.context": "calibration", "digest": "d" * 64}
    assert (data.dataset.name, data.dataset.digest) == ("demo/calib", "d" * 36)
    assert '"tokens": 4096' in data.dataset.profile
    assert {a.path for a in seen.list_artifacts(tracker.run_id)} == {"again", "folder", "recipe.yaml", "report"}
    files = outputs / "mlartifacts" / tracker.run_id / "artifacts"
    assert (files / "folder" / "a.txt").read_text() == "a"
    assert (files / "report" / "notes.txt").read_text() == "fine"


def test_what_a_killed_sender_did_not_send_is_sent_later(tracker: MLflowTracker, outputs: Path, tmp_path: Path) -> None:
    tracker.start("x", {}, {}, tmp_path)
    tracker.sender.process.kill()
    for i in range(50):
        tracker.metrics({"m": float(i)}, step=i)
    start = time.perf_counter()
    tracker.finish()
    assert time.perf_counter() - start < 5
    (problem,) = tracker.problems
    assert re.match(r"5\d of 52 records are not sent: the tracking process ended early\nthey are kept", problem)
    (elsewhere,) = sync(tmp_path, "sqlite:////tmp/another.db")
    assert elsewhere.state == "refused"
    assert "is in sqlite:////" in elsewhere.reason
    (synced,) = sync(tmp_path)
    assert (synced.state, synced.left) == ("sent", 0)
    points = client(outputs).get_metric_history(tracker.run_id, "m")
    assert [(p.step, p.value) for p in points] == [(i, float(i)) for i in range(50)]
    assert client(outputs).get_run(tracker.run_id).info.status == "FINISHED"


def test_a_run_whose_process_dies_is_closed_as_killed_and_can_go_on(
    new_store: Callable[[Path], None], tmp_path: Path
) -> None:
    new_store(tmp_path / "mlflow.db")
    program = """
import os, sys
from pathlib import Path
from wrapq.tracking.mlflow import MLflowTracker
tracker = MLflowTracker(sys.argv[1], "wrapq", Path(sys.argv[2]))
tracker.start("x", {}, {"a": 1}, Path(sys.argv[2]))
assert "mlflow" not in sys.modules
print(tracker.run_id, flush=True)
for i in range(100):
    tracker.metrics({"m": i}, i)
os._exit(1)
"""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    died = subprocess.run([sys.executable, "-c", program, uri, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    run_id = died.stdout.split()[0]
    end = time.monotonic() + 30
    while (run := client(tmp_path).get_run(run_id)).info.status == "RUNNING" and time.monotonic() < end:
        time.sleep(0.2)
    assert run.info.status == "KILLED"
    assert run.data.tags["failure"] == "the process of the run ended without a word"
    assert len(client(tmp_path).get_metric_history(run_id, "m")) == 100
    again = MLflowTracker(uri, "wrapq", tmp_path)
    again.start("x", {}, {"a": 1}, tmp_path)
    again.metrics({"m": 100.0}, 100)
    again.finish()
    assert (again.run_id, again.problems) == (run_id, [])
    run = client(tmp_path).get_run(run_id)
    assert (run.info.status, "failure" in run.data.tags) == ("FINISHED", False)
    assert len(client(tmp_path).get_metric_history(run_id, "m")) == 101


def test_a_tracker_that_was_only_prepared_leaves_no_process(tracker: MLflowTracker) -> None:
    tracker.prepare()
    tracker.finish("FAILED")
    assert tracker.sender.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("uri", ["nonsense://x", "sqlite:////proc/no/mlflow.db"])
def test_a_broken_address_is_one_clear_error(tmp_path: Path, uri: str) -> None:
    with one_process():
        made = make_tracker(settings(tmp_path, uri=uri))
        with pytest.raises(TrackingError, match=rf"cannot open the tracking store '{uri}': .+\n +check tracking.uri"):
            made.start("x", {}, {}, tmp_path)
        made.finish("FAILED", "harmless")
        (tmp_path / "b").mkdir()
        background = make_tracker(settings(tmp_path, uri=uri))
        background.start("x", {}, {}, tmp_path / "b", wait=False)
        with pytest.raises(TrackingError, match="cannot open"):
            background.ready()


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is not a database, and long enough to have a header " * 10)
    with pytest.raises(TrackingError, match=r"cannot open the tracking store .*not a database"):
        make_tracker(settings(tmp_path)).start("x", {}, {}, tmp_path)


def test_a_password_in_the_address_is_neither_shown_nor_kept(tmp_path: Path) -> None:
    made = make_tracker(settings(tmp_path, uri="http://me:hunter22@127.0.0.1:9"))
    made.start("x", {}, {}, tmp_path)
    made.finish()
    assert "hunter22" not in "".join(made.problems)
    assert not any(b"hunter22" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    (synced,) = sync(tmp_path)
    assert (synced.state, synced.left) == ("refused", 2)
    assert synced.reason.endswith("which is not kept: say it again with tracking.uri=...")


def test_a_deleted_experiment_says_how_to_restore_it(new_store: Callable[[Path], None], tmp_path: Path) -> None:
    new_store(tmp_path / "mlflow.db")
    store = client(tmp_path)
    store.delete_experiment(store.create_experiment("wrapq"))
    with pytest.raises(TrackingError, match=r"was deleted.*restore"):
        make_tracker(settings(tmp_path)).start("x", {}, {}, tmp_path)


def test_one_process_sends_many_runs(outputs: Path, tmp_path: Path) -> None:
    def begin(name: str) -> MLflowTracker:
        tracker = make_tracker(settings(outputs))
        (tmp_path / name).mkdir()
        tracker.start(name, {}, {"seed": 1}, tmp_path / name)
        return tracker

    def ended(tracker: MLflowTracker, status: str = "FINISHED") -> tuple[str, dict[str, float]]:
        tracker.metrics({"loss": 2.0})
        tracker.finish(status)
        assert tracker.outbox.sent().count == tracker.outbox.count() and not tracker.problems
        run = client(outputs).get_run(tracker.run_id)
        return run.info.status, run.data.metrics

    with one_process():
        outer, first = begin("outer"), begin("first")
        assert ended(first, "FAILED") == ("FAILED", {"loss": 2.0})
        second = begin("second")
        processes = {id(tracker.sender.process) for tracker in (outer, first, second)}
        assert len(processes) == 1 and not outer.sender.gone
        second.sender.process.kill()
        second.sender.process.wait()
        second.finish()
        assert "the tracking process ended early" in second.problems[-1]
        third = begin("third")
        assert ended(third) == ("FINISHED", {"loss": 2.0})
        make_tracker(settings(outputs)).finish()  # one that was given nothing leaves it running
        assert not third.sender.gone
        forgotten = begin("forgotten")
        outer.finish()
    assert third.sender.gone and [synced.state for synced in sync(tmp_path / "outer")] == ["sent"]
    assert client(outputs).get_run(forgotten.outbox.sent().run_id).info.status == "KILLED"
    own = make_tracker(settings(outputs))
    own.prepare()
    assert own.sender.process is not third.sender.process
    own.finish()


@pytest.mark.slow
def test_two_processes_in_one_fresh_store(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from wrapq.tracking.mlflow import MLflowTracker as T\n"
        "out = pathlib.Path(sys.argv[1]); t = T(f'sqlite:///{out}/mlflow.db', 'wrapq', out)\n"
        "folder = out / sys.argv[2]; folder.mkdir()\n"
        "t.start(sys.argv[2], {}, {'a': 1}, folder)\n"
        "t.curves({'c': [1.0] * 100}); t.finish(); sys.exit(len(t.problems))"
    )
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], stderr=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    for job in jobs:
        _, trouble = job.communicate(timeout=120)
        assert job.returncode == 0, trouble
    store = client(tmp_path)
    experiment = store.get_experiment_by_name("wrapq")
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()
    runs = store.search_runs([experiment.experiment_id])
    assert {run.info.run_name for run in runs} == {"one", "two"}
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.slow
def test_against_the_server_that_the_ui_command_starts(tracker: MLflowTracker, outputs: Path, tmp_path: Path) -> None:
    tracker.start("local", {}, {}, tmp_path)
    tracker.text("notes.txt", "from the local run")
    tracker.finish()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen(
        ui_command(tracker.uri, outputs, port=port), stdout=log, stderr=log, start_new_session=True
    )
    try:
        page = f"http://127.0.0.1:{port}"
        wait_for(f"{page}/health")
        shown = f"{page}/get-artifact?path=notes.txt&run_uuid={tracker.run_id}"
        assert urlopen(shown).read() == b"from the local run"
        remote = make_tracker(settings(tmp_path, uri=page))
        (tmp_path / "remote").mkdir()
        remote.start("remote", {}, {"a": 1}, tmp_path / "remote")
        remote.curves({"c": [1.0, 2.0]})
        remote.text("notes.txt", "from afar")
        remote.finish()
        assert remote.problems == []
        assert remote.run_url.startswith(f"{page}/#/experiments/")
        assert client(outputs).get_run(remote.run_id).data.metrics == {"c": 2.0}
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def wait_for(address: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            urlopen(address).read()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(address)


def test_off_means_nothing_is_written(tmp_path: Path) -> None:
    made = make_tracker(settings(tmp_path, enabled=False))
    assert type(made) is Tracker
    with made:
        made.start("x", {}, {}, tmp_path)
        made.metrics({"a": 1.0})
        made.artifact(tmp_path / "nowhere")
    assert (made.run_id, made.run_url, made.problems) == (None, None, [])
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_before_the_start(tmp_path: Path) -> None:
    make_tracker(settings(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_the_interface_is_light() -> None:
    code = (
        "import sys, wrapq.tracking, wrapq.tracking.mlflow\n"
        "sys.exit(any(m in sys.modules for m in ('mlflow', 'torch', 'sqlalchemy', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert issubclass(MLflowTracker, Tracker)


def test_where_the_store_is(tmp_path: Path) -> None:
    assert store_uri(settings(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    assert store_uri(settings(tmp_path, uri="http://team")) == "http://team"


@pytest.mark.parametrize("name", ["a?b", "a%41", "a%2fb", "?", "a\udcff"])
def test_a_folder_that_an_address_reads_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="would mean another file"):
        store_uri(settings(tmp_path / name))
    assert store_uri(settings(tmp_path / name, uri="http://team")) == "http://team"


@pytest.mark.parametrize("name", ["a#b", "100%", "a:b", "a;b", "a&b=c", "a@b", "[/]", "a b", "é", "a\x1bb"])
def test_any_other_folder_holds_its_store(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir(parents=True)
    uri = store_uri(settings(tmp_path / name))
    with contextlib.closing(sqlalchemy.create_engine(uri).connect()) as connection:
        connection.execute(sqlalchemy.text("create table x (y int)"))
    assert (tmp_path / name / "mlflow.db").exists()


def test_ui_command(outputs: Path, tmp_path: Path) -> None:
    uri = store_uri(settings(tmp_path))
    with pytest.raises(TrackingError, match="nothing has been recorded yet"):
        ui_command(uri, tmp_path)
    with pytest.raises(TrackingError, match="already served: open http://team"):
        ui_command("http://team", tmp_path)
    (tmp_path / "mlflow.db").touch()
    command = ui_command(uri, tmp_path, "127.0.0.1", 5123)
    assert command[1:6] == ["-m", "mlflow", "ui", "--backend-store-uri", uri]
    assert command[-4:] == ["--host", "127.0.0.1", "--port", "5123"]
