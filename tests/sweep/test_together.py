"""Which weights a job rounds for those that follow."""

from __future__ import annotations

from wrapq.recipe.axes import parse_axes
from wrapq.resolve.plan import Plan
from wrapq.sweep.planner import Planner
from wrapq.sweep.together import specs_in_common

BITS = ("recipe=w4a16_gptq", "rules.linear.weight.dtype=int3,int4,int8")


def plans(*overrides: str) -> list[Plan]:
    axes = parse_axes(overrides)
    return [job.plan for job in Planner(axes, ()).jobs(axes.grid())]


def in_common(*overrides: str) -> dict[str, list[str]]:
    first, *others = plans(*overrides)
    return {point: list(map(str, specs)) for point, specs in specs_in_common(first, others).items()}


def test_recipes_that_differ_in_the_spec() -> None:
    found = in_common(*BITS, "calibration.schedule=parallel")
    assert set(found) == set(next(s for s in plans(BITS[0])[0].stages if s.phase == "round" and s.needs).targets)
    assert set(map(tuple, found.values())) == {("int4:g128:sym:signed", "int8:g128:sym:signed")}
    first, *_ = plans(*BITS, "calibration.schedule=parallel")
    assert specs_in_common(first, [first]) == {}


def test_each_spec_once() -> None:
    found = in_common(*BITS, "calibration.schedule=parallel", "evaluation.tokens=512,1024")
    assert set(map(tuple, found.values())) == {("int4:g128:sym:signed", "int8:g128:sym:signed")}


def test_not_what_sees_something_else() -> None:
    parallel = "calibration.schedule=parallel"
    assert in_common(*BITS) == {}, "in the sequential schedule each sees its own quantized blocks"
    assert in_common("recipe=w4a16_gptq", parallel, "calibration.seed=1,2") == {}
    assert in_common("recipe=w4a16_gptq", parallel, "stack.round.damp=0.01,0.1") == {}
    assert in_common("recipe=w4a16_gptq,w4a16_rtn", parallel) == {}
    assert in_common("recipe=w4a16_awq", parallel, BITS[1]) == {}, "transforms look at the specs"


def test_not_to_specs_whose_global_scale_lies_with_other_weights() -> None:
    found = in_common("recipe=w4a16_gptq", "calibration.schedule=parallel", "rules.linear.weight=int4:g128,nvfp4,mxfp4")
    assert set(map(tuple, found.values())) == {("fp4_e2m1:g32:sym:scale=e8m0",)}
