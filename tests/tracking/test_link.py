"""A sweep and its jobs belong together in the store, whichever of them gets there first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.tracking.server import free_port
from wrapq.tracking.mlflow import MLflowTracker
from wrapq.tracking.outbox import PARENT, SWEEP, Outbox
from wrapq.tracking.process import one_process
from wrapq.tracking.sync import sync


def record(folder: Path, uri: str, tags: Mapping[str, str]) -> None:
    folder.mkdir()
    tracker = MLflowTracker(uri, "wrapq", folder.parent)
    tracker.start(folder.name, tags, {}, folder, wait=False)
    tracker.metrics({"m": 1.0})
    tracker.finish()


@pytest.mark.parametrize("first", [pytest.param("sweep", marks=pytest.mark.slow), "job"])
def test_a_job_is_linked_when_both_are_sent(first: str, new_store: Callable[[Path], None], tmp_path: Path) -> None:
    new_store(tmp_path / "team.db")
    away, uri = f"http://127.0.0.1:{free_port()}", f"sqlite:///{tmp_path}/team.db"
    with one_process():
        record(tmp_path / "sweep", away, {})
        record(tmp_path / "a-job", away, {SWEEP: str(tmp_path / "sweep")})
    if first == "job":
        (alone,) = sync(tmp_path / "a-job", uri)
        assert (alone.state, alone.left) == ("sent", 0)
    assert {synced.state for synced in sync(tmp_path, uri)} <= {"sent", "nothing"}
    job, parent = (Outbox(tmp_path / name).sent().run_id for name in ("a-job", "sweep"))
    assert MlflowClient(tracking_uri=uri).get_run(job).data.tags[PARENT] == parent
    assert [synced.state for synced in sync(tmp_path, uri)] == ["nothing", "nothing"]
