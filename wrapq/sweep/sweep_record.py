"""What a sweep leaves in writing: `outputs/<sweep>/<time>/` with its jobs, table, plot and page, and its MLflow run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy

from wrapq.engine.goals import COLLAPSED
from wrapq.engine.record import record_goals
from wrapq.html.sweep_page import render_sweep
from wrapq.ownership import own
from wrapq.recipe.schema import Settings
from wrapq.runs.folder import REPORT, RunFolder
from wrapq.sweep.plot import save_plot
from wrapq.sweep.table import SweepTable
from wrapq.tracking.base import Tracker

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
        owner: held while the sweep goes on, so that no other process takes it up.
    """

    folder: RunFolder
    facts: Mapping[str, Any]
    tracker: Tracker
    continued: bool
    owner: AcquireReturnProxy

    @classmethod
    def open(cls, settings: Settings, facts: Mapping[str, Any], tracker: Tracker) -> SweepRecord:
        """A new record, or that of the newest sweep of the same identity when it did not end.

        Raises:
            InUseError: another process is at this very sweep.
            OutputError, TrackingError: the folder or the MLflow run cannot be made.
        """
        outputs, name = Path(settings.paths.outputs), facts["name"]
        before = _unfinished(outputs.expanduser() / name, facts["identity"])
        folder = RunFolder(before) if before else RunFolder.create(outputs, name, _SPACE)
        owner = own(folder.path / ".lock", f"the sweep {folder.path}")
        tags = {"sweep": name, "overrides": " ".join(facts["overrides"]), "folder": str(folder.path.resolve())}
        params = {key: facts[key] for key in ("axes", "sampler", "options", "minimize", "total")}
        tracker.start(name, tags, params, folder.path)
        record = cls(folder, {**facts, "run_id": tracker.run_id}, tracker, before is not None, owner)
        record.write(RUNNING)
        return record

    def write(self, status: str, table: SweepTable | None = None) -> None:
        """Write down how the sweep stands."""
        facts = {"status": status, **self.facts}
        if table is not None:
            winner = table.winner.number if table.winner else None
            facts |= {"winner": winner, "rule": table.rule(), "quality": table.quality}
            facts["jobs"] = [row.cells() for row in table.rows]
        self.folder.write_text(SWEEP_FILE, json.dumps(facts, indent=1) + "\n")

    def close(self, table: SweepTable, status: str = FINISHED) -> None:
        """Write table, plot and winner, in the folder and in MLflow."""
        done = sum(row.done for row in table.rows)
        counted = f"{len(table.rows)} jobs, {done} done, {len(table.failed)} failed"
        summary = f"{counted}. The winner has the {table.rule()}."
        self.write(status, table)
        self.folder.write_text(TABLE, table.to_csv())
        self.folder.write(PLOT, lambda path: save_plot(table, path))
        self.folder.write(REPORT, lambda path: render_sweep(_jobs(table), path, self.facts["name"], summary))
        for name in (SWEEP_FILE, TABLE, PLOT, REPORT):
            self.tracker.artifact(self.folder.path / name)
        self.tracker.metrics({"jobs/done": done, "jobs/failed": len(table.failed)})
        if table.winner is not None:
            outcome = table.winner.outcome
            tags = {"winner": table.winner.number, "winner.rule": table.rule(), "winner.run_id": outcome.run_id or ""}
            values = {f"winner.{key}": value for key, value in table.winner.values.items()}
            self.tracker.tags({**tags, **values, "winner.folder": outcome.folder})
            self.tracker.metrics({f"winner/{name}": value for name, value in outcome.figures.items()})
            record_goals(self.tracker, outcome.goals)
        elif table.has_goals:
            self.tracker.tags({"goals": "missed"})
        self.tracker.finish("FINISHED" if status == FINISHED else "KILLED")
        self.owner.lock.release()


def _jobs(table: SweepTable) -> list[dict[str, Any]]:
    """The rows as the page takes them."""
    words = {True: "met", False: "missed"}
    return [
        {
            "name": f"job {row.number}",
            "status": row.outcome.status.upper(),
            "reason": row.outcome.reason,
            "parameters": dict(row.values),
            "figures": row.outcome.figures,
            "goals": COLLAPSED if row.collapsed else words[row.meets_goals] if row.outcome.goals else "",
            "winner": row.winner,
        }
        for row in table.rows
    ]


def _unfinished(parent: Path, identity: str) -> Path | None:
    """The newest sweep under `parent` with the same identity; None when it ended."""
    for path in sorted(parent.glob(f"*/{SWEEP_FILE}"), reverse=True):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(held, dict) and held.get("identity") == identity:
            return None if held.get("status") == FINISHED else path.parent
    return None
