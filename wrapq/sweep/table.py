"""The jobs of a sweep side by side: which are on the Pareto front, and which one wins."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wrapq.engine.goals import all_met, collapsed
from wrapq.foreign import spreadsheet_cell
from wrapq.metrics import KL, SECONDS, SIZE, metric, metrics, pareto
from wrapq.sweep.job import DONE, FAILED, Outcome


@dataclass(frozen=True)
class SweepRow:
    """One job of the table.

    Attributes:
        number: the job's, from 1.
        values: what varies, by key.
        outcome: what became of it.
        fronts: the figures (size_mb, seconds) against which no other job is better in both that and the quality.
        winner: whether it is the one.
    """

    number: int
    values: Mapping[str, str]
    outcome: Outcome
    fronts: tuple[str, ...] = ()
    winner: bool = False

    @property
    def done(self) -> bool:
        """Whether the job has figures."""
        return self.outcome.status in DONE

    @property
    def meets_goals(self) -> bool:
        """Whether the job is done and misses no goal."""
        return self.done and all_met(self.outcome.goals)

    @property
    def collapsed(self) -> bool:
        """Whether the job is done and its model did not survive."""
        return self.done and collapsed(self.outcome.goals)

    def cells(self) -> dict[str, Any]:
        """The row as plain values, by column."""
        reached, outcome = self.outcome.figures, self.outcome
        return {
            "job": self.number,
            **self.values,
            "status": outcome.status,
            **{row.name: reached.get(row.name) for row in metrics()},
            **reached,
            "goals_met": self.meets_goals if outcome.goals else None,
            "pareto": " ".join(self.fronts),
            "winner": self.winner,
            "digest": outcome.digest,
            "folder": outcome.folder,
            "run_id": outcome.run_id,
            "reason": outcome.reason,
        }


@dataclass(frozen=True)
class SweepTable:
    """All rows of a sweep, judged.

    Attributes:
        rows: in the order of the jobs.
        minimize: the figures that decide the winner, the first first.
    """

    rows: tuple[SweepRow, ...]
    minimize: tuple[str, ...]
    has_goals: bool = False

    @property
    def quality(self) -> str:
        """The figure that stands for quality in the Pareto fronts."""
        return next((name for name in self.minimize if not metric(name).cost), KL)

    @property
    def costs(self) -> tuple[str, ...]:
        """What quality is drawn against: size, time, and each other cost that is minimized and all jobs have."""
        done = [row.outcome.figures for row in self.rows if row.done]
        more = (name for name in self.minimize if metric(name).cost and all(name in figures for figures in done))
        return tuple(dict.fromkeys((SIZE, SECONDS, *more)))

    @property
    def winner(self) -> SweepRow | None:
        """The row that wins; None when no job is done, or none meets its goals."""
        return next((row for row in self.rows if row.winner), None)

    @property
    def failed(self) -> tuple[SweepRow, ...]:
        """The rows of jobs that failed."""
        return tuple(row for row in self.rows if row.outcome.status == FAILED)

    @property
    def collapsed(self) -> tuple[SweepRow, ...]:
        """The rows of jobs whose model did not survive; none of them wins."""
        return tuple(row for row in self.rows if row.collapsed)

    def rule(self) -> str:
        """How the winner is chosen, in words."""
        asked = ["meet all goals"] * self.has_goals + ["did not collapse"] * bool(self.collapsed)
        return f"lowest {self.minimize[0]}" + (f" among the jobs that {' and '.join(asked)}" if asked else "")

    def front(self, against: str) -> list[SweepRow]:
        """The rows on the front of quality against `against`, the smallest of it first."""
        on = [row for row in self.rows if against in row.fronts]
        return sorted(on, key=lambda row: row.outcome.figures[against])

    def to_csv(self) -> str:
        """The table with a line of column names; jobs may lack columns of others."""
        cells = [row.cells() for row in self.rows]
        columns = dict.fromkeys(name for row in cells for name in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: spreadsheet_cell(value) for name, value in row.items()} for row in cells)
        return text.getvalue()


def make_table(rows: Iterable[SweepRow], minimize: Sequence[str]) -> SweepTable:
    """Judge the rows: which are on a front, and which one wins.

    The winner's figures are the lowest, the first of `minimize` first; of equals it is the smaller, then the earlier.
    """
    rows = tuple(rows)
    table = SweepTable(rows, tuple(minimize), any(not v.survival for row in rows for v in row.outcome.goals.values()))
    done = [row for row in rows if row.done]
    fronts: dict[int, tuple[str, ...]] = dict.fromkeys((row.number for row in rows), ())
    for against in table.costs:
        points = [(row.outcome.figures[table.quality], row.outcome.figures[against]) for row in done]
        for row in itertools.compress(done, pareto(points)):
            fronts[row.number] += (against,)
    names = [*minimize, SIZE]
    able = [row for row in rows if row.meets_goals and all(name in row.outcome.figures for name in names)]
    best = min(able, key=lambda row: [*(row.outcome.figures[name] for name in names), row.number], default=None)
    judged = (replace(row, fronts=fronts[row.number], winner=row is best) for row in rows)
    return replace(table, rows=tuple(judged))
