"""A run that states what both calibration schedules give."""

from __future__ import annotations

from pathlib import Path

import pytest

import wrapq
from tests.engine.record import SMALL
from wrapq.engine.record import RunResult
from wrapq.errors import PlanError, RecipeError


def run(outputs: Path, *overrides: str) -> RunResult:
    return wrapq.run("w4a16_gptq", [*SMALL, "tracking=none", f"paths.outputs={outputs}", *overrides])


@pytest.mark.slow
def test_both_schedules_are_stated_and_the_recipe_s_is_kept(tmp_path: Path):
    both = run(tmp_path, "evaluation.compare_schedules=true")
    other = run(tmp_path, "calibration.schedule=parallel")
    assert both.digests["qparams"] != other.digests["qparams"]
    said = {}
    for name, result in (("sequential", both), ("parallel", other)):
        metrics = result.metrics["quantized"]
        said[name] = f"{name}: perplexity {metrics['perplexity']:.3f}, KL {metrics['kl']:.5f}"
    assert f"{said['sequential']}; {said['parallel']}" in both.notes
    assert said["sequential"].partition(": ")[2] != said["parallel"].partition(": ")[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("stack.round.asymmetric=1",), r"parallel runs none\n    set evaluation\.compare_schedules=false"),
        (("algorithm@stack.round=rtn",), "compare_schedules: nothing reads"),
    ],
    ids=["asymmetric", "no-data"],
)
def test_what_cannot_be_compared_is_refused(overrides: tuple[str, ...], message: str, tmp_path: Path):
    with pytest.raises((PlanError, RecipeError), match=message):
        run(tmp_path, "evaluation.compare_schedules=true", *overrides)
