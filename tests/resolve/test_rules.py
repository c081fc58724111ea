"""Rules: whom they mean, how they patch each other, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import build_model
from tests.resolve.conftest import BOTH, MakePlan, spec_of
from wrapq.recipe.schema import Match, Rule
from wrapq.resolve.resolve import resolve_specs
from wrapq.resolve.rules import Sources

LINEAR = "linear: {match: {type: Linear}, weight: int4:g128:sym, input: int8:tensor:asym}\n"
INT8 = "int8:tensor:asym"
DOWN = "model.layers.0.mlp.down_proj"


def names(plan) -> list[str]:
    return [module.name for module in plan.modules]


def test_a_mapping_patches_only_its_keys(make_plan: MakePlan) -> None:
    plan = make_plan(LINEAR + "down: {match: {name: '*.down_proj'}, weight: {dtype: int8}}\n", BOTH)
    assert spec_of(plan, f"{DOWN}.weight") == "int8:g128:sym"
    assert spec_of(plan, f"{DOWN}.input") == "int8:tensor:asym"
    assert spec_of(plan, "lm_head.weight") == "int4:g128:sym"


def test_a_short_form_replaces_the_whole_spec_of_its_point(make_plan: MakePlan) -> None:
    plan = make_plan(LINEAR + "down: {match: {name: '*.down_proj'}, weight: int8:channel}\n", BOTH)
    assert spec_of(plan, f"{DOWN}.weight") == "int8:channel:sym"
    assert spec_of(plan, f"{DOWN}.input") == "int8:tensor:asym"


def test_replace_forgets_the_other_points_too(make_plan: MakePlan) -> None:
    plan = make_plan(LINEAR + "down: {match: {name: '*.down_proj'}, replace: true, weight: int8:channel}\n", BOTH)
    assert spec_of(plan, f"{DOWN}.weight") == "int8:channel:sym"
    assert spec_of(plan, f"{DOWN}.input") is None


def test_the_later_of_two_overlapping_rules_wins_whatever_their_names(make_plan: MakePlan) -> None:
    eight = "{match: {name: '*_proj'}, weight: int8:channel}"
    four = "{match: {layers: 0, type: Linear}, weight: int4:channel}"
    assert spec_of(make_plan(f"a: {eight}\nb: {four}"), f"{DOWN}.weight") == "int4:channel:sym"
    assert spec_of(make_plan(f"a: {four}\nb: {eight}"), f"{DOWN}.weight") == "int8:channel:sym"
    assert spec_of(make_plan(f"b: {four}\na: {eight}"), f"{DOWN}.weight") == "int8:channel:sym"


def test_float_takes_one_point_out_and_quantize_false_the_module(make_plan: MakePlan) -> None:
    plan = make_plan(
        LINEAR + "down: {match: {name: '*.down_proj'}, input: float}\nhead: {match: {name: lm_head}, quantize: false}",
        BOTH,
    )
    assert spec_of(plan, f"{DOWN}.input") is None
    assert spec_of(plan, f"{DOWN}.weight") == "int4:g128:sym"
    assert "lm_head" not in names(plan)


def test_activation_is_what_matrix_products_read_and_the_others_are_listed_with_how_to_ask(make_plan: MakePlan) -> None:
    ranges = "ranges: {algorithm: ranges}\n"
    few = make_plan(f"all: {{match: {{name: '*'}}, activation: {INT8}}}\n", ranges)
    assert {(point.name, point.spec) for module in few.modules for point in module.points} == {("input", INT8)}
    assert {module.wrapper for module in few.modules} == {"Linear"}
    left = {row.name: row.reason for row in few.untouched}
    assert left["model.norm"] == left["model.layers.0.self_attn"] == "no rule; every point: activations"
    both = make_plan(f"all: {{match: {{name: '*'}}, activation: {INT8}, activations: int16:tensor:sym}}\n", ranges)
    assert (spec_of(both, f"{DOWN}.input"), spec_of(both, f"{DOWN}.output")) == (INT8, "int16:tensor:sym")
    assert spec_of(both, "model.norm.input") == "int16:tensor:sym"


def test_activations_are_all_points_but_the_weight_and_points_name_one(make_plan: MakePlan) -> None:
    rules = "mlp: {match: {type: MLP}, activations: int8:tensor, points: {mul: int16:tensor}}"
    plan = make_plan(rules, "ranges: {algorithm: ranges}")
    specs = {point.name: point.spec for point in plan.modules[0].points}
    assert specs == {"input": "int8:tensor:sym", "mul": "int16:tensor:sym", "output": "int8:tensor:sym"}


@pytest.mark.parametrize(
    ("match", "blocks"),
    [
        ("layers: 2", [2]),
        ("layers: -1", [3]),
        ("layers: '1:3'", [1, 2]),
        ("layers: '2:'", [2, 3]),
        ("layers: ':-1'", [0, 1, 2]),
        ("name: 're:model\\.layers\\.[01]\\..*'", [0, 1]),
        ("name: [model.layers.0.*, model.layers.3.*]", [0, 3]),
    ],
)
def test_blocks_that_a_match_means(match: str, blocks: list[int], make_plan: MakePlan) -> None:
    plan = make_plan(f"some: {{match: {{type: Linear, {match}}}, weight: int8:channel}}")
    assert sorted({module.block for module in plan.modules}) == blocks
    assert len(plan.modules) == 7 * len(blocks)


@pytest.mark.parametrize(
    ("match", "count"),
    [
        ("type: '*Norm'", 9),  # a glob over class names
        ("type: RMSNorm", 9),  # the wrapper's kind
        ("type: LlamaRMSNorm", 9),  # the class
        ("type: [Embedding, RMSNorm]", 10),
        ("name: down_proj", 4),  # the last part of a name
        ("name: mlp.down_proj", 4),
        ("name: model.norm", 1),
        ("name: '*.self_attn.[qk]_proj'", 8),
        ("name: 're:.*_proj'", 28),
    ],
)
def test_modules_that_a_match_means(match: str, count: int, make_plan: MakePlan) -> None:
    assert len(make_plan(f"some: {{match: {{{match}}}, weight: int8:tensor}}").modules) == count


GATES = {f"model.layers.{layer}.mlp.shared_expert_gate" for layer in range(2)}


def planned(match: Match) -> tuple[set[str], dict[str, str]]:
    """What a rule quantizes in a mixture with a shared expert, and why the rest is left."""
    rules = {"some": Rule(match=match, weight="int8:channel")}
    modules, untouched = resolve_specs(rules, build_model("qwen2_moe").to("meta"), Sources({}))
    return {m.name for m in modules}, {row.name: row.reason for row in untouched}


def test_the_gate_of_a_shared_expert_is_left_as_routers_are_and_the_plan_says_so() -> None:
    quantized, left = planned(Match(type="Linear"))
    assert "model.layers.0.mlp.shared_expert.gate_proj" in quantized and not quantized & GATES
    assert {left[name] for name in GATES} == {"no rule; one output: type Gate"}
    assert left["model.layers.0.mlp.gate"] == "no wrapper"


@pytest.mark.parametrize("match", [Match(type="Gate"), Match(name="*.shared_expert_gate")])
def test_who_means_gates_says_gates(match: Match) -> None:
    assert planned(match)[0] == GATES


def test_a_regular_expression_fits_whole_names_only(refusal: Callable[..., str]) -> None:
    assert "name 're:down_proj' matches no module" in refusal("a: {match: {name: 're:down_proj'}, weight: int8:tensor}")


def test_an_optional_rule_may_match_nothing(make_plan: MakePlan) -> None:
    rules = "a: {match: {name: '*.dwon_proj'}, optional: true, weight: int8:channel}\n"
    assert len(make_plan(rules + "b: {match: {type: Linear}, weight: int8:channel}").modules) == 29


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("a: {match: {type: Liner}, weight: int8:channel}", "type 'Liner' matches no module\n    did you mean: Linear"),
        ("a: {match: {name: '*norm*', type: Linear}, weight: int8:channel}", "no module fits all of its name"),
        ("a: {match: {layers: '3:1'}, weight: int8:channel}", "layers 3:1 is outside the model's 4 blocks (0 to 3)"),
        ("a: {match: {name: 're:(x'}, weight: int8:channel}", "'re:(x' is no regular expression: missing )"),
        ("a: {match: {type: Linear}}", "mine.yaml:4: rules.a: the rule selects modules but says nothing of them"),
        ("a: {match: {type: MLP}, points: {mull: int8}}", "none of the 4 modules it matches has a point 'mull'"),
        ("a: {match: {type: Attention}, weight: int8:tensor}", "none of the 4 modules it matches has a point 'weight'"),
        ("a: {match: {type: LlamaRotaryEmbedding}, weight: int8:tensor}", "only modules that have no wrapper: Llama"),
        ("a: {match: {type: Linear}, weight: int8:token:dyn}", "a weight does not change, so it cannot be dynamic"),
        ("a: {match: {type: Linear}, weight: {observer: mse}}", "self_attn.q_proj.weight and 28 more: no dtype in"),
        ("a: {match: {type: Linear}, weight: int8:channel:minmx}", "unknown observer 'minmx'; did you mean: minmax"),
        ("a: {match: {type: Linear}, weight: int8:chanel}", "part of a spec 'chanel'; did you mean: channel"),
        ("a: {match: {type: Linear}, weight: int8:symm}", "unknown part of a spec 'symm'; did you mean: sym"),
        ("a: {match: {type: Linear}, input: int8:tokn:dyn}", "takes each tensor's own range; did you mean: token"),
        ("a: {match: {type: Linear}, weight: 'int8:tensor:percentile(percentil=99)'}", "percentile has no option"),
        (
            "a: {match: {type: Linear}, input: int8:tensor:asym:zero=float}",
            "float zero points are for weights; input needs zero_point: int",
        ),
        ("a: {match: {type: Linear}, weight: {dtype: int8, zero_point: float}}", "is for asymmetric integers"),
        ("a: {match: {type: Linear}, input: int8:channel}", "an activation's channels are its last axis"),
        ("a: {match: {type: Linear}, input: int8:g100:dyn}", "group size 100 does not divide the width 256"),
    ],
)  # fmt: skip
def test_rules_that_cannot_work(rules: str, message: str, refusal: Callable[..., str]) -> None:
    assert message in refusal(rules)


def test_all_rules_that_match_nothing_are_reported_at_once(refusal: Callable[..., str]) -> None:
    said = refusal("a: {match: {type: Liner}, weight: int8:channel}\nb: {match: {layers: 9}, weight: int8:channel}")
    assert said.startswith("2 problems in the plan:\n  - mine.yaml:4: rules.a.match: ")
    assert "\n  - mine.yaml:5: rules.b.match: " in said


def test_one_problem_stands_for_all_modules_it_is_about(refusal: Callable[..., str]) -> None:
    said = refusal("a: {match: {type: Linear}, weight: int4:g100}")
    assert said.count("\n  - ") == 2  # two widths
    assert "model.layers.0.mlp.down_proj.weight and 3 more" in said


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ("{match: {type: Linear}, weight: 'nvfp4:local'}", "a weight does not change, so it cannot be local: use"),
        ("{match: {type: Linear}, weight: int8:head}", "a weight has no heads: use tensor, channel, group or block"),
        ("{match: {type: MLP}, points: {mul: 'int8:b16x16'}}", "fixed blocks have rows, and so no meaning for tensors"),
        ("{match: {type: Linear}, input: int8:head}", "one scale for each attention head, and it has none"),
        ("{match: {type: Activation}, output: int8:head:dyn}", "one scale for each attention head, and it has none"),
        (
            "{match: {type: Attention}, points: {context: int8:head}}",
            "and of LlamaAttention only query, key, value, scores, probs have: use tensor, or token with dyn",
        ),
        ("{match: {type: Embedding}, output: int8:channel@-2}", "output is as long as the data: use channel@-1"),
        ("{match: {type: Attention}, points: {probs: int8:channel@-1}}", "that axis of probs is as long as the data"),
        ("{match: {type: Attention}, points: {scores: int8:channel}}", "scores is as long as the data: use channel@-3"),
        ("{match: {type: Attention}, points: {probs: int8:g16:dyn}}", "the last axis of probs is as long as the data"),
        ("{match: {type: Attention}, points: {key: int4:g24}}", "group size 24 does not divide the width 32"),
        ("{match: {type: Linear}, output: int8:g24:dyn}", "group size 24 does not divide the width 256"),
        ("{match: {type: MLP}, points: {mul: int8:g100}}", "group size 100 does not divide the width 512"),
        ("{match: {type: DecoderLayer}, points: {mlp_add: int8:g24}}", "group size 24 does not divide the width 256"),
        ("{match: {type: RMSNorm}, output: int8:g24}", "group size 24 does not divide the width 256"),
        ("{match: {type: Embedding}, output: int8:g24}", "group size 24 does not divide the width 256"),
    ],
)  # fmt: skip
def test_specs_that_the_run_would_only_find_out(rules: str, reason: str, refusal: Callable[..., str]) -> None:
    assert reason in refusal(f"a: {rules}", BOTH)


def test_heads_and_channels_where_the_tensors_have_them(make_plan: MakePlan) -> None:
    points = (
        "{query: int8:head, key: int8:channel@-1, value: int4:g16, probs: int8:channel@-3, context: int8:channel@-2}"
    )
    plan = make_plan(f"a: {{match: {{type: Attention}}, points: {points}}}", "ranges: {algorithm: ranges}")
    specs = {point.name: point.spec for point in plan.modules[0].points}
    assert specs["probs"] == "int8:channel@-3:sym"
    assert len(specs) == 5
