"""What a sweep leaves in writing: `outputs/<sweep>/<time>/` with its jobs, table, plot and page, and its MLflow run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from wrapq.engine.folder import RunFolder
from wrapq.engine.record import record_goals
from wrapq.pages.run import REPORT
from wrapq.pages.sweep import render_sweep
from wrapq.recipe.schema import Settings
from wrapq.sweep.plot import save_plot
from wrapq.sweep.table import Table
from wrapq.tracking import Tracker

SWEEP_FILE, TABLE, PLOT = "sweep.json", "table.csv", "pareto.png"
RUNNING, FINISHED, INTERRUPTED = "RUNNING", "FINISHED", "INTERRUPTED"
_SPACE = 2**20


@dataclass(frozen=True)
class SweepRecord:
    """The record of one sweep.

    Attributes:
        folder: the sweep's.
        facts: what is known of the sweep from the start.
        tracker: of the sweep's MLflow run.
        continued: whether the sweep was begun before.
        lock: held while the sweep goes on, so that no other process takes it up.
    """

    folder: RunFolder
    facts: Mapping[str, Any]
    tracker: Tracker
    continued: bool
    lock: TextIO | None

    @classmethod
    def open(cls, settings: Settings, facts: Mapping[str, Any], tracker: Tracker) -> SweepRecord:
        """A new record, or that of the newest sweep of the same identity when it did not end.

        Raises:
            OutputError, TrackingError: the folder or the MLflow run cannot be made.
        """
        outputs, name = Path(settings.paths.outputs), facts["name"]
        before = _unfinished(outputs.expanduser() / name, facts["identity"])
        folder = RunFolder(before[0]) if before else RunFolder.create(outputs, name, _SPACE)
        lock = _lock(folder.path) if before is None else before[2]
        tags = {"sweep": name, "overrides": " ".join(facts["overrides"]), "folder": str(folder.path.resolve())}
        params = {key: facts[key] for key in ("axes", "sampler", "options", "minimize", "total")}
        tracker.start(name, tags, params, folder.path)
        record = cls(folder, {**facts, "run_id": tracker.run_id}, tracker, before is not None, lock)
        record.write(RUNNING)
        return record

    def write(self, status: str, table: Table | None = None) -> None:
        """Write down how the sweep stands."""
        facts = {"status": status, **self.facts}
        if table is not None:
            winner = table.winner.number if table.winner else None
            facts |= {"winner": winner, "rule": table.rule(), "quality": table.quality}
            facts["jobs"] = [row.cells() for row in table.rows]
        self.folder.write_text(SWEEP_FILE, json.dumps(facts, indent=1) + "\n")

    def close(self, table: Table, status: str = FINISHED) -> None:
        """Write table, plot and winner, in the folder and in MLflow."""
        self.write(status, table)
        self.folder.write_text(TABLE, table.to_csv())
        self.folder.write(PLOT, lambda path: save_plot(table, path))
        self.folder.write(REPORT, lambda path: render_sweep(_jobs(table), path, self.facts["name"], _summary(table)))
        for name in (SWEEP_FILE, TABLE, PLOT, REPORT):
            self.tracker.artifact(self.folder.path / name)
        done = sum(row.done for row in table.rows)
        self.tracker.metrics({"jobs/done": done, "jobs/failed": len(table.failed)})
        if table.winner is not None:
            outcome = table.winner.outcome
            said = {"winner": table.winner.number, "winner.rule": table.rule(), "winner.run_id": outcome.run_id or ""}
            values = {f"winner.{key}": value for key, value in table.winner.values.items()}
            self.tracker.tags({**said, **values, "winner.folder": outcome.folder})
            self.tracker.metrics({f"winner/{name}": value for name, value in outcome.figures.items()})
            record_goals(self.tracker, outcome.goals)
        elif table.has_goals:
            self.tracker.tags({"goals": "missed"})
        self.tracker.finish("FINISHED" if status == FINISHED else "KILLED")
        if self.lock is not None:
            self.lock.close()


def _jobs(table: Table) -> list[dict[str, Any]]:
    """The rows as the page takes them."""
    words = {True: "met", False: "missed"}
    return [
        {
            "name": f"job {row.number}",
            "status": row.outcome.status.upper(),
            "reason": row.outcome.reason,
            "parameters": dict(row.values),
            "figures": row.outcome.figures,
            "goals": words[row.meets_goals] if row.outcome.goals else "",
            "winner": row.winner,
        }
        for row in table.rows
    ]


def _summary(table: Table) -> str:
    done = sum(row.done for row in table.rows)
    return f"{len(table.rows)} jobs, {done} done, {len(table.failed)} failed. The winner has the {table.rule()}."


def _unfinished(parent: Path, identity: str) -> tuple[Path, dict[str, Any], TextIO | None] | None:
    """The newest sweep under `parent` with the same identity, record and lock; None when it ended or goes on."""
    for path in sorted(parent.glob(f"*/{SWEEP_FILE}"), reverse=True):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(held, dict) and held.get("identity") == identity:
            if held.get("status") == FINISHED:
                return None
            with contextlib.suppress(BlockingIOError):
                return path.parent, held, _lock(path.parent)
    return None


def _lock(folder: Path) -> TextIO | None:
    """The lock of a sweep's folder, where the system has locks; raises `BlockingIOError` when another holds it."""
    if os.name == "nt":
        return None
    import fcntl

    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise
    return lock
