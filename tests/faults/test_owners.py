"""What one process writes in, a second one does not touch; it is told who is there."""

from __future__ import annotations

import os
import re
import signal

import pytest

from tests import forked
from tests.faults.runs import RECIPE, digests, finish, got_past, start, wait
from tests.test_ownership import HELD
from wrapq.engine.export import whole_folder
from wrapq.ownership import InUseError
from wrapq.tracking.outbox import Event, Outbox
from wrapq.tracking.sync import sync


def test_a_second_process_that_resumes_a_live_run_is_refused_and_the_run_goes_on(tmp_path, undisturbed) -> None:
    first = start(tmp_path)
    wait(got_past(tmp_path, 1))
    os.kill(first.pid, signal.SIGSTOP)  # in the middle, for as long as the second one takes
    try:
        second = finish(tmp_path, "--resume")
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 5
    assert re.search(rf"error: the run {re.escape(str(tmp_path / RECIPE))}/\S+ {HELD.format(first.pid)}", second.stderr)
    first.join()
    assert first.exitcode == 0, (tmp_path / "errors").read_text()
    assert digests(tmp_path) == [undisturbed]
    assert not [path.name for path in next(tmp_path.glob(f"{RECIPE}/*/")).iterdir() if path.name.startswith(".")]


def test_the_second_of_two_syncs_is_told(tmp_path) -> None:
    outbox = Outbox(tmp_path)
    outbox.append(Event("open", {"name": "x", "uri": "file:///none", "experiment": "x", "outputs": str(tmp_path)}))
    with outbox.owned():
        (synced,) = sync(tmp_path)
    assert synced.state == "in use" and re.search(HELD.format(os.getpid()), synced.reason)


def test_the_second_of_two_equal_exports_is_told(tmp_path) -> None:
    target = tmp_path / "export" / "compressed_tensors"
    for text in ("first", "newer"):
        with whole_folder(target) as partial:
            (partial / "file").write_text(text)
            with pytest.raises(InUseError, match=f"the export {re.escape(str(target))} {HELD.format(os.getpid())}"):
                whole_folder(target).__enter__()
        assert [path.name for path in target.parent.iterdir()] == [target.name]
        assert [(path.name, path.read_text()) for path in target.iterdir()] == [("file", text)]


def test_the_second_of_two_equal_sweeps_is_told(tmp_path) -> None:
    words = ["sweep", f"recipe={RECIPE}", "stack.round.damp=0.01,0.02", "evaluation.tokens=1024", "tracking=none"]
    words += ["calibration.samples=8", f"paths.outputs={tmp_path}"]
    first = forked.start(words, tmp_path, [tmp_path / "said", tmp_path / "errors"])
    wait(lambda: any(tmp_path.glob("sweep/*/jobs/*.json")))
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = forked.wrapq(words)
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.join()
    assert second.returncode == 5
    assert re.search(rf"error: the sweep \S+ {HELD.format(first.pid)}", second.stderr)
    assert len(list(tmp_path.glob("sweep/*/"))) == 1
