"""A model that did not survive its quantization: said everywhere, with what did it; no alias moves to it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient

from wrapq.cli import main
from wrapq.engine.goals import collapsed, judge
from wrapq.recipe.schema import Goals

RUIN = '+rules.down={match: {name: "*.mlp.down_proj"}, input: int2:tensor}'
SMALL = ("recipe=w8a8_static", "calibration.samples=4", "evaluation.tokens=512", "runtime.kernels=reference")
ALLOWED = ("goals.top1_agreement=0", "goals.perplexity_increase=99900%")


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["run", *SMALL, *words])


@pytest.mark.slow
def test_it_is_said_with_what_did_it_and_no_alias_moves(new_store: Callable[[Path], None], tmp_path: Path) -> None:
    outputs = tmp_path / "out"
    new_store(outputs / "mlflow.db")
    place = f"paths.outputs={outputs}"
    done = run(RUIN, place, "tracking.register_as={name: small, alias: champion}")
    said = " ".join(done.output.split())
    assert done.exit_code == 12, said
    assert "collapsed: top-1 agreement" in said and "the alias champion of small stays where it is" in said
    assert "collapsed: with all quantized, by stage ranges" in said
    first = re.search(r"with one kind of point in float: (\S+) \(int2:tensor:sym\)", said)
    assert first and first[1] == "model.layers.*.mlp.down_proj.input"
    (folder,) = outputs.glob("w8a8_static/*/")
    assert json.loads((folder / "run.json").read_text())["verdict"] == "collapsed"
    assert ">collapsed</span>" in (folder / "report.html").read_text()
    uri = f"sqlite:///{outputs / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    (tracked,) = client.search_runs([client.get_experiment_by_name("wrapq").experiment_id])
    assert tracked.data.tags["goals"] == "collapsed"
    (version,) = client.search_model_versions("name='small'")
    assert not version.aliases and not client.get_registered_model("small").aliases

    change = re.search(r"try ('\+rules\.kept=.*?}')", said)
    assert change, said
    mended = run(RUIN, *shlex.split(change[1]), place, "tracking=none")
    assert mended.exit_code == 0, mended.output


@pytest.mark.slow
def test_what_weights_alone_lost_is_told_with_what_rounds_better(tmp_path: Path) -> None:
    plain = ("~stack.smooth", "algorithm@stack.round=rtn")
    done = run(*plain, "rules.linear.weight=int2:tensor", f"paths.outputs={tmp_path}", "tracking=none")
    said = " ".join(done.output.split())
    assert done.exit_code == 12, said
    assert "collapsed: with weights quantized, by stage round" in said
    assert "collapsed: rtn looks at no data: try algorithm@stack.round=gptq" in said


def test_a_goal_of_ones_own_may_allow_it(tmp_path: Path) -> None:
    done = run(RUIN, *ALLOWED, f"paths.outputs={tmp_path}", "tracking=none")
    assert done.exit_code == 0 and "collapsed" not in done.output
    missed = run(RUIN, ALLOWED[0], "goals.perplexity_increase=1%", f"paths.outputs={tmp_path}", "tracking=none")
    assert missed.exit_code == 10


@pytest.mark.parametrize(
    ("reached", "goals", "lost"),
    [
        ({"top1_agreement": 0.5, "perplexity_increase": 4.0}, {}, set()),
        ({"top1_agreement": 0.499, "perplexity_increase": 0.1}, {}, {"top1_agreement"}),
        ({"top1_agreement": 0.9, "perplexity_increase": 4.01}, {}, {"perplexity_increase"}),
        ({"top1_agreement": 0.1}, {}, {"top1_agreement"}),
        ({"size_mb": 3.0}, {}, set()),
        ({"top1_agreement": 0.1, "perplexity_increase": 9.0}, {"top1_agreement": 0.05}, {"perplexity_increase"}),
        ({"top1_agreement": float("nan")}, {}, {"top1_agreement"}),
    ],
)
def test_what_survives(reached: dict[str, float], goals: dict[str, float], lost: set[str]) -> None:
    verdicts = judge(Goals(**goals), reached)
    assert {name for name, verdict in verdicts.items() if verdict.survival} == lost
    assert collapsed(verdicts) == bool(lost)


@pytest.mark.slow
def test_no_job_whose_model_collapsed_wins_a_sweep(tmp_path: Path) -> None:
    ruin = RUIN.replace("input: int2:tensor", "input: float")
    words = ["sweep", "sweep.minimize=kl", ruin, "rules.down.input=int2:tensor,int8:tensor", *SMALL]
    done = CliRunner().invoke(main, [*words, f"paths.outputs={tmp_path}", "tracking=none"])
    said = " ".join(done.output.split())
    assert done.exit_code == 0, said
    assert "collapsed: job 1: " in said and "winner: job 2" in said and "the jobs that did not collapse" in said
    words[2:4] = [RUIN, "evaluation.batch_size=4,8"]
    none = CliRunner().invoke(main, [*words, f"paths.outputs={tmp_path}", "tracking=none", "sweep.name=none"])
    assert none.exit_code == 12 and "no winner: no job left a model that works" in none.output, none.output
