"""Real servers that are away, die, fail and hang: a run neither stops nor waits, and nothing is lost or doubled."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

import wrapq
from tests.engine.record import SMALL, status
from tests.tracking.server import Proxy, Server, free_port
from wrapq.tracking.mlflow import MLflowTracker
from wrapq.tracking.outbox import Outbox
from wrapq.tracking.sync import Synced, sync

pytestmark = pytest.mark.slow  # a server takes as long to start as many other tests together
POINTS = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server")).start()
    yield made
    made.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    made = Proxy(server.port)
    yield made
    made.close()


def begin(uri: str, folder: Path) -> MLflowTracker:
    folder.mkdir(exist_ok=True)
    tracker = MLflowTracker(uri, "wrapq", folder)
    tracker.start("run", {"kind": "test"}, {"a": 1, "b": {"c": "d"}}, folder)
    return tracker


def measure(tracker: MLflowTracker, start: int, count: int = POINTS // 3) -> float:
    """Record points one by one; the seconds that took."""
    before = time.perf_counter()
    for step in range(start, start + count):
        tracker.metrics({"m": step / 7}, step)
    return time.perf_counter() - before


def end(tracker: MLflowTracker, folder: Path, outcome: str = "FINISHED") -> None:
    (folder / "notes.md").write_text("some notes")
    tracker.artifact(folder / "notes.md")
    tracker.text("deep/er/text.txt", "a text")
    tracker.dataset("data", "d" * 64, "demo", "calibration", {"tokens": 12})
    tracker.finish(outcome, "it broke" if outcome == "FAILED" else None)


def check(uri: str, folder: Path, outcome: str = "FINISHED") -> tuple[int, int]:
    """Everything arrived, once and in order; how many records were sent and how many points found."""
    client, outbox = MlflowClient(tracking_uri=uri), Outbox(folder)
    sent = outbox.sent()
    assert (sent.state, sent.count, sent.rejected) == ("open", outbox.count(), [])
    run = client.get_run(sent.run_id)
    key = run.data.tags["wrapq.run"]
    (only,) = client.search_runs([run.info.experiment_id], f"tags.`wrapq.run` = '{key}'")
    assert only.info.run_id == sent.run_id
    assert run.data.params == {"a": "1", "b.c": "d"}
    assert run.data.tags["kind"] == "test"
    points = client.get_metric_history(sent.run_id, "m")
    assert [(p.step, p.value) for p in points] == [(i, i / 7) for i in range(POINTS)]
    assert {file.path for file in client.list_artifacts(sent.run_id)} == {"notes.md", "deep"}
    assert len(run.inputs.dataset_inputs) == 1
    check_times(run, outbox, outcome)
    return sent.count, len(points)


def check_times(run: Run, outbox: Outbox, outcome: str) -> None:
    events = [event for event, _ in outbox.read()]
    assert run.info.status == outcome
    assert (run.info.start_time, run.info.end_time) == (events[0].arguments["time"], events[-1].arguments["time"])


def only(results: Iterator[Synced]) -> Synced:
    (result,) = results
    return result


def test_a_server_that_fails_in_the_middle_and_is_well_again_at_sync(proxy: Proxy, tmp_path: Path) -> None:
    tracker = begin(proxy.uri, tmp_path)
    taken = measure(tracker, 0)
    proxy.mode = "lose"  # what it took and did not confirm is sent again
    taken += measure(tracker, POINTS // 3)
    wait_until(lambda: proxy.mode == "lose" and Outbox(tmp_path).sent().state == "away")
    proxy.mode = "fail"
    taken += measure(tracker, 2 * POINTS // 3)
    before = time.perf_counter()
    end(tracker, tmp_path, "FAILED")
    assert time.perf_counter() - before < 15
    assert taken < 1
    (problem,) = tracker.problems
    assert "records are not sent: " in problem
    assert f"wrapq sync {tmp_path}" in problem
    assert only(sync(tmp_path)).state == "away"
    proxy.mode = "pass"
    assert only(sync(tmp_path)).left == 0
    assert only(sync(tmp_path)).state == "nothing"
    sent, found = check(proxy.uri, tmp_path, "FAILED")
    print(f"\nfails in the middle: {sent} records sent, {found} of {POINTS} points found, {taken:.3f} s to record them")


def wait_until(holds: object, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_the_creation_of_a_run_that_was_not_confirmed_is_not_repeated(proxy: Proxy, tmp_path: Path) -> None:
    proxy.mode = "lose"
    tracker = begin(proxy.uri, tmp_path)
    assert tracker.run_id is None
    measure(tracker, 0, POINTS)
    wait_until(lambda: proxy.seen > 3)
    proxy.mode = "pass"
    wait_until(lambda: Outbox(tmp_path).sent().state == "open")
    end(tracker, tmp_path)
    assert tracker.run_id is not None
    check(proxy.uri, tmp_path)


def test_a_server_that_hangs_costs_seconds(proxy: Proxy, tmp_path: Path) -> None:
    proxy.mode = "hang"
    before = time.perf_counter()
    tracker = begin(proxy.uri, tmp_path)
    waited = time.perf_counter() - before
    taken = measure(tracker, 0, POINTS)
    before = time.perf_counter()
    end(tracker, tmp_path)
    ended = time.perf_counter() - before
    print(f"\nhangs: {waited:.1f} s at the start, {taken:.3f} s for {POINTS} points, {ended:.1f} s at the end")
    assert taken < 1
    assert waited + ended < 60  # imports included
    proxy.mode = "pass"
    assert only(sync(tmp_path)).state == "sent"
    check(proxy.uri, tmp_path)


def test_a_server_that_dies_in_the_middle_and_comes_back(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    own, folder = Server(tmp_path / "server").start(), tmp_path / "run"
    tracker = begin(own.uri, folder)
    measure(tracker, 0)
    wait_until(lambda: Outbox(folder).sent().count > 10)
    own.kill()
    measure(tracker, POINTS // 3)
    wait_until(lambda: Outbox(folder).sent().state == "away")
    own.start()
    try:
        measure(tracker, 2 * POINTS // 3)
        wait_until(lambda: Outbox(folder).sent().state == "open")
        end(tracker, folder)
        assert tracker.problems == []
        check(own.uri, folder)
    finally:
        own.kill()


def test_a_whole_run_without_its_server_is_recorded_afterwards(tmp_path: Path) -> None:
    """From the command line to `wrapq sync`; the server starts when the run is long over, and its folder elsewhere."""
    port, outputs = free_port(), tmp_path / "outputs"
    place = [f"tracking.uri=http://127.0.0.1:{port}", f"paths.outputs={outputs}"]
    result = wrapq.run("demo", [*SMALL, *place])
    assert result.run_id is None
    assert status(result.folder)["status"] == "FINISHED"
    assert "cannot open the tracking store" in result.notes[0]
    assert "records are not sent" in result.notes[-1]
    moved = tmp_path / "moved"
    result.folder.rename(moved)
    (tmp_path / "server").mkdir()
    own = Server(tmp_path / "server", port=port).start()
    try:
        command = [sys.executable, "-m", "wrapq", "sync", str(moved)]
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert "left" not in said
        sent, client = Outbox(moved).sent(), MlflowClient(tracking_uri=own.uri)
        run = client.get_run(sent.run_id)
        assert sent.run_url in said
        assert run.info.status == "FINISHED"
        assert run.data.metrics["quantized/kl"] == pytest.approx(result.metrics["quantized"]["kl"])
        assert {"recipe.yaml", "plan.json", "qparams.safetensors"} <= {
            f.path for f in client.list_artifacts(sent.run_id)
        }
    finally:
        own.kill()


def test_a_run_killed_together_with_its_sender_is_closed_at_sync(proxy: Proxy, tmp_path: Path) -> None:
    program = """
import os, sys, time
from pathlib import Path
from wrapq.tracking.mlflow import MLflowTracker
folder = Path(sys.argv[2])
tracker = MLflowTracker(sys.argv[1], "wrapq", folder)
tracker.start("run", {}, {}, folder)
for i in range(50): tracker.metrics({"m": i}, i)
tracker.sender.process.kill(); tracker.sender.process.wait()
with tracker.outbox.events.open("ab") as file: file.write(b'{"method": "metr')
os._exit(1)
"""
    subprocess.run([sys.executable, "-c", program, proxy.uri, str(tmp_path)], env=os.environ)
    assert only(sync(tmp_path)).state == "sent"
    client, sent = MlflowClient(tracking_uri=proxy.uri), Outbox(tmp_path).sent()
    run = client.get_run(sent.run_id)
    assert (run.info.status, run.data.tags["failure"][:11]) == ("KILLED", "the process")
    assert len(client.get_metric_history(sent.run_id, "m")) == 50
