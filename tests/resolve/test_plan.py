"""The plan itself: who said what, what is left alone, and that it is one thing in every process and form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.models import random_model, without_weights
from tests.resolve.conftest import BOTH, MakePlan
from wrapq.errors import PlanError
from wrapq.recipe.compose import compose
from wrapq.resolve.plan import ModulePlan, Plan
from wrapq.resolve.resolve import resolve


def shipped(*overrides: str) -> Plan:
    composed = compose(overrides)
    return resolve(composed.recipe, composed.sources)


def module(plan: Plan, name: str) -> ModulePlan:
    return next(m for m in plan.modules if m.name == name)


def sources(plan: Plan, name: str, point: str) -> tuple[str, ...]:
    return next(p.sources for p in module(plan, name).points if p.name == point)


def test_provenance_names_file_and_line() -> None:
    plan = shipped("recipe=w8a8_static")
    assert sources(plan, "model.layers.0.mlp.down_proj", "weight") == ("rule linear, conf/scheme/w8a8_static.yaml:2",)


def test_provenance_names_the_override_that_chose_the_file() -> None:
    plan = shipped("recipe=w8a8_static", "scheme=w8a16", "~stack.ranges", "~stack.smooth")
    (said,) = sources(plan, "model.layers.0.mlp.down_proj", "weight")
    assert said == "rule linear, conf/scheme/w8a16.yaml:2 (override scheme=w8a16)"


def test_provenance_names_everyone_who_still_has_a_say() -> None:
    plan = shipped("rules.mlp.weight.group_size=64")
    assert set(sources(plan, "model.layers.0.mlp.down_proj", "weight")) == {
        "rule mlp, conf/scheme/w4a8.yaml:2",
        "rule mlp, recipes/demo.yaml:17",
        "rule mlp, override rules.mlp.weight.group_size=64",
    }


def test_provenance_of_a_patched_key_moves_to_the_patch(make_plan: MakePlan) -> None:
    rules = "a: {match: {type: Linear}, weight: int4:g128}\nb: {match: {name: lm_head}, weight: {dtype: int8}}"
    assert sources(make_plan(rules), "lm_head", "weight") == ("rule a, mine.yaml:4", "rule b, mine.yaml:5")


def test_untouched_modules_have_a_reason(tmp_path: Path) -> None:
    plan = shipped("recipe=w8a8_static")
    reasons = {row.name: row.reason for row in plan.untouched}
    assert reasons["lm_head"] == "rule head"
    assert reasons["model.embed_tokens"] == reasons["model.norm"] == "no rule"
    assert not set(reasons) & {m.name for m in plan.modules}
    unknown = shipped("recipe=w8a8_static", f"model.path={random_model('opt', tmp_path / 'opt')}", "~rules.head")
    assert {(row.type, row.reason) for row in unknown.untouched} >= {("OPTLearnedPositionalEmbedding", "no rule")}


def test_modules_know_block_shape_and_wrapper() -> None:
    plan = shipped("recipe=int16_activations")
    down = module(plan, "model.layers.3.mlp.down_proj")
    assert (down.block, down.weight_shape, down.wrapper, down.multiplies) == (3, (256, 512), "Linear", True)
    assert module(plan, "model.norm").weight_shape == (1, 256)
    assert [p.name for p in module(plan, "model.layers.0.self_attn").points] == [
        *("query", "key", "value", "scores", "probs", "context")
    ]
    assert (plan.model.blocks, plan.model.block_count, plan.model.type) == ("model.layers", 4, "LlamaForCausalLM")


def test_a_plan_is_immutable() -> None:
    plan = shipped("recipe=w8a16")
    with pytest.raises(ValidationError, match="frozen"):
        plan.notes = ("changed",)  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        plan.modules[0].name = "changed"  # type: ignore[misc]


@pytest.mark.parametrize("recipe", ["demo", "w4a16_gptq", "int16_activations"])
def test_json_gives_the_same_plan_back(recipe: str) -> None:
    plan = shipped(f"recipe={recipe}")
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    assert again.digest() == plan.digest()
    assert again.specs() == plan.specs()


@pytest.mark.slow
def test_the_digest_is_the_same_in_another_process(tmp_path: Path) -> None:
    script = "from wrapq.recipe.compose import compose; from wrapq.resolve.resolve import resolve;"
    script += "c = compose(['recipe=w8a8_static']); print(resolve(c.recipe, c.sources).digest())"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == shipped("recipe=w8a8_static").digest()


def test_the_digest_does_not_depend_on_who_said_it(make_plan: MakePlan) -> None:
    in_file = make_plan("a: {match: {type: Linear}, weight: int8:channel}")
    by_override = make_plan("a: {match: {type: Linear}, weight: int4:channel}", "round: {algorithm: rtn}\n",
                            "rules.a.weight=int8:channel")  # fmt: skip
    assert in_file.modules != by_override.modules
    assert in_file.digest() == by_override.digest()


@pytest.mark.parametrize(
    "change",
    [
        "rules.linear.weight.observer=mse",
        "calibration.samples=7",
        "calibration.seed=1",
        "evaluation.tokens=9",
        "seed=3",
    ],
)
def test_the_digest_depends_on_what_is_done(change: str) -> None:
    assert shipped("recipe=w8a8_static", change).digest() != shipped("recipe=w8a8_static").digest()


def test_the_machine_is_not_in_the_digest() -> None:
    machine = ("runtime=cpu", "tracking=none", "paths.outputs=elsewhere")
    assert shipped("recipe=w8a16", *machine).digest() == shipped("recipe=w8a16").digest()


def test_no_value_of_the_plan_is_an_omegaconf_object() -> None:
    plan = shipped("recipe=w8a8_static")
    assert json.loads(plan.model_dump_json())["recipe"] == plan.recipe.model_dump(mode="json")


def test_tied_embeddings_with_one_of_them_quantized_are_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = without_weights(tmp_path / "tied", tie_word_embeddings=True)
    said = refusal("head: {match: {name: lm_head}, weight: int8:channel}", "round: {algorithm: rtn}\n",
                   f"model.path={path}")  # fmt: skip
    assert said == (
        "1 problem in the plan:\n"
        "  - rules: these are one tied tensor, but model.embed_tokens.weight is float, lm_head.weight is "
        "int8:channel:sym\n"
        "    give them the same weight spec, or leave them all float"
    )


def test_tied_embeddings_may_share_one_spec(tmp_path: Path) -> None:
    path = without_weights(tmp_path / "tied", tie_word_embeddings=True)
    tied, untied = (shipped("recipe=int16_activations", *more) for more in ([f"model.path={path}"], []))
    assert {m.name for m in tied.modules} >= {"lm_head", "model.embed_tokens"}
    assert untied.estimate.quantized_bytes - tied.estimate.quantized_bytes == 2048 * (256 + 4) + 16  # int64 N and K


def test_a_path_that_is_no_model_quotes_its_source(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"override model\.path=.*: model\.path: no such folder: "):
        shipped(f"model.path={tmp_path / 'nothing'}")


def test_a_packaged_model_that_does_not_exist() -> None:
    with pytest.raises(PlanError, match=r"no such folder: wrapq://demp\n    did you mean: wrapq://demo\n"):
        shipped("model.path=wrapq://demp")


def test_planning_reads_no_weights(tmp_path: Path) -> None:
    path = without_weights(tmp_path / "weightless")
    assert (
        shipped("recipe=int16_activations", f"model.path={path}").specs() == shipped("recipe=int16_activations").specs()
    )


def test_both_stages_of_a_plan_cover_all_static_points(make_plan: MakePlan) -> None:
    plan = make_plan("linear: {match: {type: Linear}, weight: int8:channel, input: int8:tensor}", BOTH)
    points = {f"{m.name}.{p.name}" for m in plan.modules for p in m.points}
    assert {target for stage in plan.stages for target in stage.targets} == points
