"""A metric of a plug-in: one file, and it stands wherever the engine's own do."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient

from tests.installed import Interpreter, write_package
from wrapq.evaluation.quality import StageMeter
from wrapq.metrics import METRICS, Metric, measures, metrics

PLUGIN = '''
import torch

from wrapq.metrics import Band, Metric, measures

GOAL = "At least this mean cosine similarity of the logits with the float model's."


@measures(Metric("cosine", "cosine", GOAL, "{:.6f}".format, higher=True, band=Band(absolute=0.001)))
class Cosine:
    """Mean cosine similarity of the logits over real tokens."""

    def __init__(self):
        self.sum, self.count = 0.0, 0

    def update(self, reference, logits, ids, mask):
        cosines = torch.cosine_similarity(reference.double(), logits.double(), dim=-1)
        real = torch.ones_like(cosines) if mask is None else mask
        self.sum, self.count = self.sum + float((cosines * real).sum()), self.count + int(real.sum())

    def result(self):
        return {"cosine": self.sum / self.count}
'''
SMALL = ("evaluation.tokens=256", "evaluation.seq_len=64", "runtime.threads=1", "runtime.kernels=reference")


@dataclass
class Installed:
    """wrapq beside an installed package that is the plug-in, and a sweep of two jobs with a goal on its metric."""

    folder: Path
    sweep: tuple[int, str]
    interpreter: Interpreter

    def wrapq(self, *commands: list[str]) -> list[tuple[int, str]]:
        """Status and output of commands, one after the other."""
        return [self.interpreter.wrapq(*arguments) for arguments in commands]

    @property
    def runs(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("outputs/*/*/run.json"))

    def figures(self) -> list[float]:
        """The metric of the quantized model as each run wrote it down."""
        return [json.loads((run / "run.json").read_text())["stages"]["quantized"]["cosine"] for run in self.runs]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[Path], None]) -> Iterator[Installed]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "team_cosine.py").write_text(PLUGIN)
    write_package(folder, "team_cosine", {"wrapq.plugins": {"team_cosine": "team_cosine"}})
    new_store(folder / "outputs" / "mlflow.db")
    # groups of 128 are the smaller model of the two, those of 32 have the better logits
    axes = ["recipe=w4a16_rtn", "rules.linear.weight.group_size=32,128", "sweep.minimize=size_mb"]
    with Interpreter(folder) as interpreter:
        swept = interpreter.wrapq("sweep", *axes, "goals.cosine=0.5", *SMALL)
        yield Installed(folder, swept, interpreter)


def test_it_is_measured_at_each_stage_but_the_float_one(installed: Installed) -> None:
    assert installed.sweep[0] == 0, installed.sweep[1]
    for run in installed.runs:
        stages = json.loads((run / "run.json").read_text())["stages"]
        assert "cosine" not in stages["float"]
        assert 0.5 < stages["quantized"]["cosine"] < 1


def test_a_sweep_shows_and_judges_it(installed: Installed) -> None:
    said = installed.sweep[1]
    assert "goal cosine: at least 0.500000: met by 2 of 2 jobs" in said
    assert all(f"{value:.6f}" in said for value in installed.figures())
    (path,) = installed.folder.glob("outputs/sweep/*/table.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(float(row["cosine"]) for row in rows) == sorted(installed.figures())
    assert {row["goals_met"] for row in rows} == {"True"}
    page = (path.parent / "report.html").read_text()
    assert all(f"{value:.6f}" in page for value in installed.figures())


def test_it_stands_in_mlflow(installed: Installed) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{installed.folder}/outputs/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    jobs = [run for run in runs if "sweep_job" in run.data.tags]
    assert sorted(run.data.metrics["quantized/cosine"] for run in jobs) == sorted(installed.figures())
    assert all(run.data.tags["goals"] == "met" for run in jobs)
    assert all("| cosine |" in run.data.tags["mlflow.note.content"] for run in jobs)
    (parent,) = (run for run in runs if run not in jobs)
    assert parent.data.metrics["winner/cosine"] in installed.figures()


def test_it_stands_in_the_page_of_a_run(installed: Installed) -> None:
    for run, value in zip(installed.runs, installed.figures(), strict=True):
        page = (run / "report.html").read_text()
        assert page.count(f"{value:.6f}") >= 2  # at the top, and in the table of the stages


def test_commands_know_it(installed: Installed) -> None:
    runs, values = installed.runs, installed.figures()
    one = str(next(installed.folder.glob("outputs/w4a16_rtn/*/recipe.lock.yaml")).parent)
    lock = yaml.safe_load((Path(one) / "recipe.lock.yaml").read_text())
    changed = {**lock, "environment": {**lock["environment"], "torch": "0"}}
    changed["metrics"]["quantized"]["cosine"] += 0.002
    (installed.folder / "elsewhere.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
    done = installed.wrapq(
        ["compare", *map(str, runs)],
        ["verify", one],
        ["verify", "elsewhere.yaml"],
        ["plan", "goals.cosin=0.9"],
        ["plan", "goals.cosine=much"],
        ["sweep", "sweep.minimize=cosine", "seed=1,2"],
        ["run", "recipe=w4a16_rtn", "goals.cosine=1.5", "tracking=none", *SMALL],
        ["schema"],
    )
    compared, same, far, misspelt, wrong, least, missed, schema = done
    (row,) = (line.split() for line in compared[1].splitlines() if line.startswith("cosine"))
    assert row.index("*") == row.index(f"{max(values):.6f}") + 1  # more is better
    assert same[0] == 0, same[1]
    assert far[0] == 1
    assert "cosine within 0.001" in far[1]
    assert "differs, first in quantized/cosine" in far[1]
    assert (misspelt[0], "did you mean: cosine" in misspelt[1]) == (2, True)
    assert (wrong[0], "should be a number such as 4.5, or a share such as 2%" in wrong[1]) == (2, True)
    assert (least[0], "unknown figure to minimize 'cosine'" in least[1]) == (2, True)
    assert missed[0] == 10
    assert "goal cosine: at least 1.500000, reached 0.9" in missed[1]
    assert any("perplexity" in line and line.endswith("cosine") for line in map(str.rstrip, missed[1].splitlines()))
    goals = json.loads(schema[1])["$defs"]["Goals"]
    assert goals["properties"]["cosine"]["description"].startswith("At least this mean cosine")
    assert goals["additionalProperties"] is False


def test_without_the_plug_in_the_name_is_unknown() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "wrapq", "plan", "goals.cosine=0.9"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "goals.cosine: unknown key 'cosine'" in result.stderr


class Count:
    """Counts batches, and how it was made."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.batches = 0

    def update(self, reference: Any, logits: Any, ids: Any, mask: Any) -> None:
        self.batches += 1

    def result(self) -> dict[str, float]:
        return {"batches": self.batches, "alone": math.pi}


@pytest.fixture
def counting() -> Iterator[None]:
    metrics()  # whatever is installed is there
    measures(
        Metric("batches", "batches", "At most so many."), Metric("alone", "alone", "At most this.", against_float=False)
    )(Count)
    yield
    for name in ("batches", "alone"):
        del METRICS._entries[name]


def test_a_meter_of_several_metrics_is_made_once(counting: None) -> None:
    logits, ids = torch.randn(2, 5, 7), torch.zeros(2, 5, dtype=torch.int64)
    Count.made = 0
    meter = StageMeter(against_float=True)
    meter.update(logits, logits, ids)
    meter.update(logits, logits, ids)
    found = meter.result()
    assert (Count.made, found["batches"], found["alone"]) == (1, 2, math.pi)
    alone = StageMeter(against_float=False)
    alone.update(None, logits, ids)
    assert alone.result().keys() == {"perplexity", "nll", "tokens", "batches", "alone"}
