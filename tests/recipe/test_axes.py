"""Which overrides vary, and over what."""

from __future__ import annotations

import pytest

from wrapq.errors import RecipeError
from wrapq.recipe.axes import Axis, Interval, parse_axes

NAMED = ("w4a16_autoround", "w4a16_gptq", "w4a16_gptq_gradient", "w4a16_rotated_gptq")


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("recipe=w4a16_rtn,w4a16_gptq", "recipe", ("w4a16_rtn", "w4a16_gptq")),
        ("recipe=glob(w4a16_*t*)", "recipe", (*NAMED, "w4a16_rtn")),
        ("recipe=glob(w4a16_*t*,exclude=*rtn)", "recipe", NAMED),
        ("scheme@rules.linear=glob([kv*,nf4])", "scheme@rules.linear", ("kv4", "kv8", "nf4")),
        ("calibration.samples=range(8,33,8)", "calibration.samples", ("8", "16", "24", "32")),
        ("+stack.round.damp=choice(0.01,0.1)", "+stack.round.damp", ("0.01", "0.1")),
        ("rules.a.match.type=[Linear,Conv1D],[Linear]", "rules.a.match.type", ("[Linear,Conv1D]", "[Linear]")),
        ("seed=1,1,2", "seed", ("1", "2")),
        ("a=interval(0.5,2)", "a", Interval(0.5, 2, whole=False, log=False)),
        ("a=int(interval(1,8))", "a", Interval(1, 8, whole=True, log=False)),
        ("a=tag(log,interval(0.001,0.1))", "a", Interval(0.001, 0.1, whole=False, log=True)),
    ],
)
def test_axis(text: str, key: str, values: object) -> None:
    assert parse_axes([text]).axes == (Axis(key, values),)


@pytest.mark.parametrize("text", ["seed=1", 'description="a,b"', "stack_order=[a,b]", "~stack.round", "goals.kl=2%"])
def test_one_value_is_left_as_it_was_written(text: str) -> None:
    axes = parse_axes([text])
    assert axes.axes == ()
    assert list(axes.grid()) == [{}]
    assert axes.overrides({}) == (text,)


def test_the_grid_varies_the_last_axis_fastest() -> None:
    axes = parse_axes(["a=1,2", "c=5", "b=x,y"])
    assert [tuple(values.values()) for values in axes.grid()] == [("1", "x"), ("1", "y"), ("2", "x"), ("2", "y")]
    assert axes.overrides({"a": "1", "b": "y"}) == ("c=5", "a=1", "b=y")


def test_every_value_is_covered_by_few_jobs() -> None:
    axes = parse_axes(["a=1,2", "b=x,y,z", "c=interval(0,1)"])
    assert [tuple(v.values()) for v in axes.cover()] == [("1", "x", "0.0"), ("2", "y", "1.0"), ("1", "z", "0.0")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tracking.uri=a,b", "tracking is the same for all jobs"),
        ("launcher=local,ray", "launcher is the same for all jobs"),
        ("recipe=glob(nothing*)", "nothing fits it"),
        ("seed=range(1,100000)", "gives more than 1,000 values"),
        ("seed=interval(3,1)", "the first number must be the smaller"),
        ("seed=tag(log,interval(0,1))", "above 0 for a logarithm"),
        ("seed=(1,", "cannot be parsed"),
    ],
)
def test_what_cannot_vary_is_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=r"override ") as caught:
        parse_axes([text])
    assert said in str(caught.value)


def test_all_mistakes_at_once_and_an_axis_given_twice() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_axes(["a=1,2", "a=3,4", "paths.outputs=x,y", "b=(1,"])
    assert len(caught.value.problems) == 3
    assert "a=...: varies twice" in str(caught.value)
