"""The stack: its order, and that every point is decided exactly once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import random_model
from tests.resolve.conftest import BOTH, MakePlan

LINEAR = "linear: {match: {type: Linear}, weight: int8:channel, input: int8:tensor:asym:percentile}\n"


def test_phases_order_the_stages(make_plan: MakePlan) -> None:
    plan = make_plan(LINEAR, "z: {algorithm: rtn}\na: {algorithm: ranges}")
    assert [(s.name, s.phase) for s in plan.stages] == [("a", "range"), ("z", "round")]
    plan = make_plan(LINEAR, "a: {algorithm: rtn}\nz: {algorithm: ranges}")
    assert [(s.name, s.phase) for s in plan.stages] == [("z", "range"), ("a", "round")]


def test_stack_order_overrides_phases(make_plan: MakePlan) -> None:
    plan = make_plan(LINEAR, BOTH, more="stack_order: [round, ranges]\n")
    assert [stage.name for stage in plan.stages] == ["round", "ranges"]


@pytest.mark.parametrize(
    ("order", "problems"),
    [
        (
            "[round, rnages]",
            ["no stage is called 'rnages'\n    did you mean: ranges", "leaves out ranges\n    name each"],
        ),
        (
            "[round]",
            ["leaves out ranges\n    name each stage once: round, ranges, in the order in which they shall run"],
        ),
        ("[round, ranges, round]", ["names round more than once\n    name each stage once"]),
        ("[]", ["leaves out round, ranges\n    name each stage once"]),
    ],
)
def test_stack_order_names_each_stage_once(order: str, problems: list[str], refusal: Callable[..., str]) -> None:
    said = refusal(LINEAR, BOTH, more=f"stack_order: {order}\n")
    assert said.count("mine.yaml:3: stack_order: ") == len(problems)
    assert all(f"stack_order: {problem}" in said for problem in problems)


def test_targets_and_needs_are_in_the_plan(make_plan: MakePlan) -> None:
    ranges, rounding = make_plan(LINEAR, BOTH).stages
    assert (ranges.needs, rounding.needs) == (("percentile",), ())
    assert len(ranges.targets) == len(rounding.targets) == 29
    assert ranges.targets[0] == "model.layers.0.self_attn.q_proj.input"
    assert (rounding.targets[-1], rounding.source) == ("lm_head.weight", "mine.yaml:7")


def test_stages_share_the_work_by_rules(make_plan: MakePlan) -> None:
    rules = "up: {match: {name: up_proj}, weight: int8:channel}\ndown: {match: {name: down_proj}, weight: int4:channel}"
    plan = make_plan(rules, "one: {algorithm: rtn, rules: [up]}\ntwo: {algorithm: gptq, rules: [down]}")
    assert {stage.name: len(stage.targets) for stage in plan.stages} == {"one": 4, "two": 4}
    assert plan.needs_calibration


def test_dynamic_points_need_no_stage(make_plan: MakePlan) -> None:
    plan = make_plan("linear: {match: {type: Linear}, weight: int8:channel, input: int8:token:dyn}")
    assert [len(stage.targets) for stage in plan.stages] == [29]
    assert not plan.needs_calibration
    assert plan.estimate.calibration_tokens == 0


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (BOTH + "again: {algorithm: rtn}", "stack.again: again and round would decide the same points, such as model."),
        ("round: {algorithm: rtn}", "stack: no stage decides 29 static activations, such as model."),
        ("ranges: {algorithm: ranges}", "stack: no stage decides 29 weights, such as"),
        (BOTH + "x: {algorithm: rtn, rules: [liner]}", "mine.yaml:9: stack.x.rules: no rule is called 'liner'\n"),
        ("round: {algorithm: rtn, rules: []}\nranges: {algorithm: ranges}", "rtn has nothing to do"),
    ],
)  # fmt: skip
def test_stacks_that_cannot_work(stack: str, message: str, refusal: Callable[..., str]) -> None:
    assert message in refusal(LINEAR, stack)


@pytest.mark.parametrize(
    "other", ["{algorithm: gptq, asymmetric: 1, rules: [down]}", "{algorithm: bias_correction, empirical: true}"]
)
def test_following_the_float_model_through_a_block_that_is_rounded_at_once_is_refused(
    other: str, refusal: Callable[..., str]
) -> None:
    rules = "up: {match: {name: up_proj}, weight: int8:channel}\ndown: {match: {name: down_proj}, weight: int4:channel}"
    whole = "{algorithm: autoround, rules: [up]}\nrest: {algorithm: rtn, rules: [down]}"
    whole = "{algorithm: autoround, rules: [up]}" if "gptq" in other else whole
    said = refusal(rules, f"whole: {whole}\nother: {other}")
    assert "other follows the float model through block 0, which whole rounds at once" in said


def test_what_a_block_rounder_cannot_round_is_refused_with_the_rule_that_leaves_it_float(
    make_plan: MakePlan, refusal: Callable[..., str]
) -> None:
    rules, stack = "linear: {match: {type: Linear}, weight: int8:channel}", "round: {algorithm: autoround}"
    said = refusal(rules, stack)
    assert "autoround rounds the weights of blocks, and lm_head lies in none" in said
    left = "+rules.outside={match: {name: [lm_head]}, quantize: false}"
    assert f"leave these float: '{left}'" in said
    assert all(module.block is not None for module in make_plan(rules, stack, left).modules)


def test_a_stage_without_targets_is_refused(refusal: Callable[..., str]) -> None:
    said = refusal("linear: {match: {type: Linear}, weight: int8:channel}", BOTH)
    assert "stack.ranges: ranges has nothing to do: no rule gives it a static activation to decide" in said
    assert "remove the stage with ~stack.ranges" in said


def test_a_hessian_is_for_what_multiplies_a_matrix(refusal: Callable[..., str]) -> None:
    said = refusal("all: {match: {name: '*'}, weight: int8:channel}", "round: {algorithm: gptq}")
    assert (
        "gptq rounds what multiplies a matrix; not so the weights of Embedding, LlamaRMSNorm (model.embed_tokens)"
        in said
    )


@pytest.mark.parametrize("algorithm", ["gptq", "seqmse", "adaround"])
@pytest.mark.parametrize("spec", ["int8:tensor:sym", "int8:channel:sym"])
def test_depthwise_convolutions_are_for_what_looks_at_a_hessian(
    algorithm: str, spec: str, tmp_path: Path, make_plan: MakePlan, refusal: Callable[..., str]
) -> None:
    model = ("model=hf", f"model.path={random_model('recurrent_gemma', tmp_path / 'model')}")
    rules = f"conv: {{match: {{type: Conv}}, weight: {spec}}}"
    plan = make_plan(rules, f"round: {{algorithm: {algorithm}}}\nfix: {{algorithm: bias_correction}}", *model)
    convolutions = [module for module in plan.modules if module.wrapper == "Conv"]
    assert [(module.groups, module.multiplies) for module in convolutions] == [(64, True)] * 2
    said = refusal(rules, "round: {algorithm: rtn}\nfix: {algorithm: low_rank}", *model)
    assert "low_rank does not correct Conv1d" in said


@pytest.mark.parametrize("stack", ["{algorithm: seqmse}", "{algorithm: gptq, ranges: hessian}"])
def test_an_observer_that_the_algorithm_would_not_ask_is_refused(stack: str, refusal: Callable[..., str]) -> None:
    rules = "l: {match: {type: Linear}, weight: int8:channel}\nm: {match: {name: '*.mlp.*'}, weight: {observer: mse}}"
    name = "seqmse" if "seqmse" in stack else "gptq"
    assert refusal(rules, f"round: {stack}") == (
        f"1 problem in the plan:\n"
        f"  - mine.yaml:7: stack.round: {name} cannot round model.layers.0.mlp.gate_proj.weight and 11 more, "
        f"int8:channel:sym:mse: it chooses the ranges itself, so that the observer mse would have no effect\n"
        f"    change the spec, or give these weights another algorithm: +algorithm@stack.others=rtn"
    )


def test_gptq_with_ranges_by_the_observer_asks_any_observer(make_plan: MakePlan) -> None:
    plan = make_plan("l: {match: {type: Linear}, weight: int8:channel:mse}", "round: {algorithm: gptq}")
    assert len(plan.stages[0].targets) == 29


def test_all_wrong_options_are_reported_at_once(refusal: Callable[..., str]) -> None:
    said = refusal("l: {match: {type: Linear}, weight: int8:channel}", "r: {algorithm: gptq, damp: -1, actorder: true}")
    assert said == (
        "2 mistakes in the recipe:\n"
        "  - mine.yaml:6: stack.r.damp: -1: input should be greater than 0\n"
        "  - mine.yaml:6: stack.r.actorder: gptq has no option 'actorder'\n"
        "    did you mean: act_order"
    )


def test_options_are_complete_in_the_plan(make_plan: MakePlan) -> None:
    (stage,) = make_plan("l: {match: {type: Linear}, weight: int8:channel}", "r: {algorithm: gptq, damp: 0.5}").stages
    assert stage.options["damp"] == 0.5
    assert stage.options["act_order"] is True


def test_asymmetric_calibration_needs_what_comes_before_quantized(refusal: Callable[..., str]) -> None:
    stack = "round: {algorithm: gptq, asymmetric: 0.5}"
    said = refusal(
        "linear: {match: {type: Linear}, weight: int8:channel}\n", stack, more="calibration: {schedule: parallel}\n"
    )
    assert "asymmetric calibration looks at what the quantized blocks before give" in said
    assert "calibration.schedule=sequential" in said
