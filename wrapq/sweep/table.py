"""The jobs of a sweep side by side: which are on the Pareto front, and which one wins."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from wrapq.engine.goals import AT_LEAST, SECONDS, all_met
from wrapq.recipe.schema import Goals
from wrapq.sweep.jobs import DONE, FAILED, Outcome

FIGURES = tuple(Goals.model_fields)
SIZE = "size_mb"
QUALITY = ("perplexity", "perplexity_increase", "kl")


@dataclass(frozen=True)
class Row:
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

    def cells(self) -> dict[str, Any]:
        """The row as plain values, by column."""
        reached, outcome = self.outcome.figures, self.outcome
        return {
            "job": self.number,
            **self.values,
            "status": outcome.status,
            **{name: reached.get(name) for name in FIGURES},
            "goals_met": self.meets_goals if outcome.goals else None,
            "pareto": " ".join(self.fronts),
            "winner": self.winner,
            "digest": outcome.digest,
            "folder": outcome.folder,
            "run_id": outcome.run_id,
            "reason": outcome.reason,
        }


@dataclass(frozen=True)
class Table:
    """All rows of a sweep, judged.

    Attributes:
        rows: in the order of the jobs.
        minimize: the figures that decide the winner, the first first.
    """

    rows: tuple[Row, ...]
    minimize: tuple[str, ...]
    has_goals: bool = field(default=False)

    @property
    def quality(self) -> str:
        """The figure that stands for quality in the Pareto fronts."""
        return next((name for name in self.minimize if name in QUALITY), "kl")

    @property
    def winner(self) -> Row | None:
        """The row that wins; None when no job is done, or none meets its goals."""
        return next((row for row in self.rows if row.winner), None)

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows of jobs that failed."""
        return tuple(row for row in self.rows if row.outcome.status == FAILED)

    def rule(self) -> str:
        """How the winner is chosen, in words."""
        among = " among the jobs that meet all goals" if self.has_goals else ""
        return f"lowest {self.minimize[0]}{among}"

    def front(self, against: str) -> list[Row]:
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
        writer.writerows(cells)
        return text.getvalue()


def make_table(rows: Iterable[Row], minimize: Sequence[str]) -> Table:
    """Judge the rows: fronts and winner."""
    table = Table(tuple(rows), tuple(minimize))
    fronts = {against: _front(table, against) for against in (SIZE, SECONDS)}
    winner = _winner(table.rows, table.minimize)
    judged = tuple(
        replace(
            row,
            fronts=tuple(against for against, numbers in fronts.items() if row.number in numbers),
            winner=row.number == winner,
        )
        for row in table.rows
    )
    return Table(judged, table.minimize, any(row.outcome.goals for row in table.rows))


def _front(table: Table, against: str) -> set[int]:
    """The numbers of the jobs that no other beats in quality and `against` both."""
    points = [(r.number, r.outcome.figures[table.quality], r.outcome.figures[against]) for r in table.rows if r.done]
    return {
        number
        for number, quality, cost in points
        if not any(q <= quality and c <= cost and (q < quality or c < cost) for _, q, c in points)
    }


def _winner(rows: Sequence[Row], minimize: Sequence[str]) -> int | None:
    """The job whose figures are the lowest, the first of `minimize` first; of equals the smaller, then the earlier."""
    names = [*minimize, SIZE]
    able = [row for row in rows if row.meets_goals and all(name in row.outcome.figures for name in names)]
    best = min(able, key=lambda row: [*(row.outcome.figures[name] for name in names), row.number], default=None)
    return best.number if best else None


def minimizable() -> list[str]:
    """The figures that a sweep may minimize."""
    return [name for name in FIGURES if name not in AT_LEAST]
