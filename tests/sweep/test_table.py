"""Fronts and winner of a table."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy

from wrapq.engine.goals import GoalVerdict
from wrapq.ownership import own
from wrapq.runs.folder import RunFolder
from wrapq.sweep.job import FAILED, FINISHED, Outcome
from wrapq.sweep.plot import save_plot
from wrapq.sweep.sweep_record import SweepRecord
from wrapq.sweep.table import SweepRow, SweepTable, make_table
from wrapq.tracking.base import Tracker


def row(number: int, kl: float, size: float, seconds: float = 1.0, met: bool | None = None) -> SweepRow:
    reached = {"kl": kl, "perplexity": 20 + kl, "perplexity_increase": kl, "size_mb": size, "seconds": seconds}
    goals = {} if met is None else {"kl": GoalVerdict(0.5, kl, met)}
    outcome = Outcome(f"key{number}", FINISHED, f"runs/{number}", None, reached, goals)
    return SweepRow(number, {"seed": str(number)}, outcome)


FAILURE = SweepRow(9, {"seed": "9"}, Outcome("key9", FAILED, reason="no memory"))
ROWS = [row(1, 0.3, 4, 9), row(2, 0.1, 8, 5), row(3, 0.2, 6, 5), row(4, 0.3, 5, 9), row(5, 0.1, 8, 6), FAILURE]


def numbers(rows: list[SweepRow]) -> list[int]:
    return [r.number for r in rows]


def test_fronts_hold_what_nothing_beats_in_both() -> None:
    table = make_table(ROWS, ["kl"])
    assert numbers(table.front("size_mb")) == [1, 3, 2, 5]
    assert numbers(table.front("seconds")) == [2]


def test_fronts_are_those_of_a_search_over_all_pairs() -> None:
    generator = numpy.random.default_rng(1)
    rows = [row(i, *generator.integers(1, 8, 3)) for i in range(60)]
    table = make_table(rows, ["kl"])
    points = {r.number: (r.outcome.figures["kl"], r.outcome.figures["size_mb"]) for r in rows}
    beaten = {i for i, p in points.items() for q in points.values() if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert set(numbers(table.front("size_mb"))) == set(points) - beaten


def test_quality_is_drawn_against_the_latency_that_a_sweep_minimizes(tmp_path: Path) -> None:
    name, times = "export_token_ms.onnx", (3.0, 2.0, 1.0, 4.0, 5.0)
    rows = [
        replace(each, outcome=replace(each.outcome, figures={**each.outcome.figures, name: time}))
        for each, time in zip(ROWS, times, strict=False)
    ]
    table = make_table(rows, ["kl", name])
    assert table.costs == ("size_mb", "seconds", name) and numbers(table.front(name)) == [3, 2]
    assert f",{name}," in table.to_csv().splitlines()[0]
    save_plot(table, tmp_path / "plot.png")
    height, width = matplotlib.image.imread(tmp_path / "plot.png").shape[:2]
    assert width > 3 * height
    assert make_table([*rows, row(6, 0.1, 1)], ["kl", name]).costs == ("size_mb", "seconds")  # one has no such figure


def test_the_winner_is_the_lowest_and_of_equals_the_smaller_then_the_earlier() -> None:
    assert make_table(ROWS, ["kl"]).winner.number == 2
    assert make_table(ROWS, ["size_mb"]).winner.number == 1
    assert make_table(ROWS, ["seconds", "kl"]).winner.number == 2
    assert make_table([row(1, 0.1, 8), row(2, 0.1, 7)], ["kl"]).winner.number == 2


def test_the_winner_meets_all_goals() -> None:
    table = make_table([row(1, 0.6, 4, met=False), row(2, 0.4, 6, met=True), row(3, 0.1, 9, met=True)], ["size_mb"])
    assert table.winner.number == 2
    assert table.rule() == "lowest size_mb among the jobs that meet all goals"
    assert make_table([row(1, 0.6, 4, met=False)], ["kl"]).winner is None


def test_nothing_finished_is_a_table_without_winner(tmp_path: Path) -> None:
    table = make_table([FAILURE], ["kl"])
    assert table.winner is None
    assert table.failed == (FAILURE,)
    save_plot(table, tmp_path / "plot.png")


def test_csv_gives_back_every_cell() -> None:
    table = make_table(ROWS, ["kl"])
    read = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [r["job"] for r in read] == ["1", "2", "3", "4", "5", "9"]
    assert [float(r["kl"]) for r in read[:-1]] == [r.outcome.figures["kl"] for r in ROWS[:-1]]
    assert [r["winner"] for r in read] == ["False", "True", "False", "False", "False", "False"]
    assert read[-1]["reason"] == "no memory"


def test_the_record_closes_with_everything_in_its_folder(tmp_path: Path) -> None:
    rows = [row(1, 0.6, 4, met=False), row(2, 0.4, 6, met=True), FAILURE]
    record = SweepRecord(
        RunFolder(tmp_path), {"name": "mine"}, Tracker(), continued=False, owner=own(tmp_path / ".lock", "it")
    )
    record.close(make_table(rows, ["kl"]))
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert left == {"sweep.json", "table.csv", "pareto.png", "report.html"}
    said = json.loads((tmp_path / "sweep.json").read_text())
    assert (said["status"], said["winner"], said["quality"]) == ("FINISHED", 2, "kl")
    page = (tmp_path / "report.html").read_text()
    assert "The winner has the lowest kl among the jobs that meet all goals." in page
    assert "no memory" in page


def test_the_plot_shows_every_job(tmp_path: Path) -> None:
    def ink(table: SweepTable) -> int:
        save_plot(table, tmp_path / "plot.png")
        return int((matplotlib.image.imread(tmp_path / "plot.png")[..., :3] < 0.9).sum())

    assert ink(make_table(ROWS, ["kl"])) > ink(make_table(ROWS[:2], ["kl"])) > 0
