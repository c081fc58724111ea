"""What is damaged of the record that a run left to be sent costs records, and neither the run nor its resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tracking.local import client, settings
from wrapq.tracking.mlflow import make_tracker
from wrapq.tracking.outbox import Event, Outbox, Sent

DAMAGE = [b"", b"\0" * 9, b"{}{", b"[1]", b"7", b"\xff"]


@pytest.mark.parametrize("text", DAMAGE)
def test_the_records_beside_a_damaged_one_are_read(text: bytes, tmp_path: Path, caplog) -> None:
    outbox = Outbox(tmp_path)
    for number in range(3):
        outbox.append(Event("metrics", {"points": [], "time": number}))
    lines = outbox.events.read_bytes().splitlines(keepends=True)
    lines[1] = text.ljust(len(lines[1]) - 1) + b"\n"
    outbox.events.write_bytes(b"".join(lines))
    assert [event.arguments["time"] for event, _ in outbox.read()] == [0, 2]
    assert "is damaged: left out" in caplog.text and outbox.opening() == {}


@pytest.mark.parametrize("text", DAMAGE)
def test_what_was_sent_is_asked_of_the_store_where_it_is_damaged(text: bytes, tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.write_sent(Sent("open", tried=True, run_id="1", record=7))
    (outbox.path / "sent.json").write_bytes(text)
    assert outbox.sent() == Sent(tried=True)


@pytest.mark.slow
def test_a_run_is_taken_up_in_the_same_tracked_run(tmp_path: Path, new_store: Callable[[Path], None]) -> None:
    outputs, folder = tmp_path / "out", tmp_path / "run"
    folder.mkdir()
    new_store(outputs / "mlflow.db")
    first = make_tracker(settings(outputs))
    first.start("demo", {"recipe": "demo"}, {"seed": 0}, folder)
    first.metrics({"before": 1.0})
    first.finish("FAILED", "interrupted")
    run_id = first.run_id
    (folder / "outbox" / "sent.json").write_bytes(b"")
    second = make_tracker(settings(outputs))
    second.start("demo", {"recipe": "demo"}, {"seed": 0}, folder)
    second.metrics({"after": 2.0})
    second.finish()
    assert second.problems == [] and second.run_id == run_id
    (run,) = client(outputs).search_runs([client(outputs).get_experiment_by_name("wrapq").experiment_id])
    assert run.info.status == "FINISHED" and run.data.metrics == {"before": 1.0, "after": 2.0}
