"""What a run reached against what its recipe asks for."""

from __future__ import annotations

import warnings

import pytest

from wrapq.engine.goals import all_met, judge
from wrapq.errors import RecipeError
from wrapq.metrics import Measured, metrics
from wrapq.recipe.compose import compose
from wrapq.recipe.dump import to_yaml
from wrapq.recipe.schema import Goals
from wrapq.resolve.resolve import check_names
from wrapq.resolve.rules import Sources

STAGES = {
    "float": {"perplexity": 20.0},
    "quantized": {"perplexity": 20.5, "kl": 0.01, "top1_agreement": 0.95},
}
EXPORT = {"token_ms": 1.5, "first_token_ms": 8.0, "peak_mb": 300.0, "size_mb": 6.2}
EXPORT |= {"top1_agreement": 1.0, "greedy_agreement": 1.0, "token_speedup": 1.5, "first_token_speedup": 2.0}
SLOWER = EXPORT | {"token_ms": 1.2, "size_mb": 6.0, "token_speedup": 1.2}
EXPORTS = {"onnx": EXPORT, "openvino": SLOWER}
REACHED = Measured(STAGES, {"quantized": 5_500_000}, {"total": 3.0}, 4.25, EXPORTS).figures()


def test_figures_are_those_that_goals_name() -> None:
    assert REACHED.keys() == {metric.name for metric in metrics(EXPORTS)}
    assert (REACHED["export_token_ms"], REACHED["export_token_speedup"]) == (1.5, 1.2)  # of two exports the worse
    assert (REACHED["export_token_ms.openvino"], REACHED["export_token_speedup.onnx"]) == (1.2, 1.5)
    assert REACHED["perplexity_increase"] == pytest.approx(0.025)
    assert REACHED["size_mb"] == 5.5


@pytest.mark.parametrize(
    ("goals", "met"),
    [
        ({"perplexity_increase": "2.5%"}, True),
        ({"perplexity_increase": "2.4%"}, False),
        ({"perplexity_increase": 0.03}, True),
        ({"top1_agreement": "95%"}, True),
        ({"top1_agreement": 0.951}, False),
        ({"bits_per_weight": 4.25, "size_mb": 5.5, "seconds": 3, "kl": 0.01, "perplexity": 20.5}, True),
        ({"bits_per_weight": 4.5, "size_mb": 5.4}, False),
        ({"export_token_ms": 1.5, "export_greedy_agreement": "100%"}, True),
        ({"export_token_ms": 1.4}, False),
        ({"export_token_speedup": 1.2, "export_size_mb": 6.2}, True),
        ({"export_token_speedup": 1.3}, False),
        ({"export_size_mb": 6.1}, False),
        ({"export_token_ms": {"openvino": 1.2}}, True),
        ({"export_token_ms": {"onnx": 1.4}}, False),
        ({"export_token_speedup": {"onnx": 1.5}, "export_greedy_agreement": {"openvino": "100%"}}, True),
        ({}, True),
    ],
)
def test_verdict(goals: dict[str, object], met: bool) -> None:
    verdicts = judge(Goals.model_validate(goals), REACHED)
    assert len(verdicts) == len(goals)
    assert all_met(verdicts) is met
    assert all((verdict.excess() <= 0) is verdict.met for verdict in verdicts.values())


def test_a_figure_that_is_not_there_meets_no_goal() -> None:
    reached = Measured(STAGES, {"quantized": 1}, {"total": 1}).figures()
    (verdict,) = judge(Goals.model_validate({"bits_per_weight": 8}), reached).values()
    assert (verdict.value, verdict.met) == (None, False)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("goals.perplexity_incrase=2%", "did you mean: perplexity_increase"),
        ("goals.kl=little", "should be a number such as 4.5, or a share such as 2%"),
        ("goals.kl=true", "should be a number"),
        ("goals.kl=.nan", "should be a number"),
        ("goals.kl.onnx=1", "goals.kl.onnx: unknown key 'onnx'"),
        ("goals.export_tokn_ms.onnx=1", "did you mean: export_token_ms"),
        ("goals.export_token_ms.onnx=fast", "goals.export_token_ms.onnx: 'fast' should be a number"),
    ],
)
def test_a_goal_that_makes_no_sense_is_refused(override: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compose([override])
    assert said in str(caught.value)


def test_goals_are_written_as_they_were_given() -> None:
    goals = compose(["goals.seconds=200", "goals.perplexity_increase=2%"]).recipe.goals
    with warnings.catch_warnings(action="error"):
        given = {name: value for name, value in goals.model_dump(mode="json").items() if value is not None}
    assert given == {"seconds": 200, "perplexity_increase": "2%"}
    assert type(given["seconds"]) is int


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["export=none", "goals.export_token_ms=1"], "a goal for exports, and the recipe has none"),
        (["goals.export_token_ms.opnvino=1"], "did you mean: openvino"),
        (["goals.export_token_ms.gguf=1"], "run with export=gguf, or without the goal"),
    ],
)
def test_a_goal_that_no_export_could_reach_is_refused(overrides: list[str], said: str) -> None:
    composed = compose(["recipe=onnx_w8a8", *overrides])
    with pytest.raises(RecipeError) as caught:
        check_names(composed.recipe, Sources(composed.sources))
    assert said in str(caught.value)


def test_a_goal_of_one_export_survives_the_recipe_that_a_run_keeps(tmp_path) -> None:
    recipe = compose(["recipe=onnx_w8a8", "goals.export_token_ms.onnx=5"]).recipe
    (kept := tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert compose([f"recipe={kept}"]).recipe.goals.bounds() == {"export_token_ms.onnx": 5.0}


def test_goals_do_not_decide_the_result() -> None:
    plain, asked = compose([]).recipe, compose(["goals.perplexity_increase=2%"]).recipe
    assert asked.goals.bounds() == {"perplexity_increase": 0.02}
    assert asked.digest() == plain.digest()
