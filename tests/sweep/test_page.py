"""The page that a sweep leaves."""

from __future__ import annotations

from pathlib import Path

from wrapq.ownership import own
from wrapq.runs.folder import RunFolder
from wrapq.sweep.job import FAILED, FINISHED, Outcome
from wrapq.sweep.sweep_record import SweepRecord
from wrapq.sweep.table import SweepRow, SweepTable
from wrapq.tracking.base import Tracker


def test_a_sweep_leaves_a_page_with_its_jobs_and_winner(tmp_path: Path) -> None:
    figures = {"perplexity": 30.0, "perplexity_increase": 0.01, "kl": 0.02, "size_mb": 5.0, "seconds": 2.0}
    better = {**figures, "kl": 0.01, "size_mb": 6.0}
    rows = (
        SweepRow(1, {"group_size": "32"}, Outcome("a", FINISHED, figures=figures), ("size_mb", "seconds")),
        SweepRow(2, {"group_size": "64"}, Outcome("b", FINISHED, figures=better), ("size_mb", "seconds"), winner=True),
        SweepRow(3, {"group_size": "7"}, Outcome("c", FAILED, reason="PlanError: 7 does not divide 96")),
    )
    facts = {"name": "demo", "run_id": None}
    SweepRecord(RunFolder(tmp_path), facts, Tracker(), False, own(tmp_path / ".lock", "it")).close(
        SweepTable(rows, ("kl",))
    )
    text = (tmp_path / "report.html").read_text()
    assert "<h1>demo</h1>" in text
    assert "3 jobs, 2 done, 1 failed. The winner has the " in text
    assert text.count('<tr class="winner">') == 1
    assert "PlanError: 7 does not divide 96" in text
    assert text.count("<svg") == 2  # against size and time; no bits per weight are known
