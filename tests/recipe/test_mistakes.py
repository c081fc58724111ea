"""Every mistake a user makes gives one message with the place, the value and what would have been right."""

import pytest

CASES = {
    "spec key": (
        ["recipe=w4a16_rtn", "rules.linear.weight.weight_bit=4"],
        """1 mistake in the recipe:
  - override rules.linear.weight.weight_bit=4: rules.linear.weight.weight_bit: unknown key 'weight_bit'
    did you mean: dtype
    the keys of a spec are: dtype, granularity, axis, group_size, block_size, symmetric, dynamic, local, scale_dtype, \
zero_point, signed_scale, global_scale, observer""",
    ),
    "scheme": (
        ["recipe=w4a16_rtn", "scheme=w4a17"],
        """1 mistake in the recipe:
  - override scheme=w4a17: unknown scheme 'w4a17'
    did you mean: w4a16, w4a16_asym, w4a8""",
    ),
    "scheme of a rule": (
        ["recipe=w4a16_rtn", "scheme@rules.linear=w4a17"],
        """1 mistake in the recipe:
  - override scheme@rules.linear=w4a17: unknown scheme 'w4a17'
    did you mean: w4a16, w4a16_asym, w4a8""",
    ),
    "scheme of several rules": (
        ["recipe=demo", "scheme=w4a16"],
        """1 mistake in the recipe:
  - override scheme=w4a16: this recipe chooses a scheme in 2 places
    say which: scheme@rules.linear=w4a16 or scheme@rules.mlp=w4a16""",
    ),
    "scheme of an unknown rule": (
        ["recipe=w4a16_rtn", "scheme@rules.liner=w8a16"],
        """1 mistake in the recipe:
  - override scheme@rules.liner=w8a16: nothing in this recipe chooses 'scheme@rules.liner'
    did you mean: scheme@rules.linear
    to add one write +scheme@rules.liner=w8a16""",
    ),
    "recipe": (
        ["recipe=w8a8_statc"],
        """1 mistake in the recipe:
  - override recipe=w8a8_statc: unknown recipe 'w8a8_statc'
    did you mean: w8a8_static, w8a8_static_rotated, w8a8_smoothquant""",
    ),
    "beginning of recipes": (
        ["recipe=w4a61"],
        """1 mistake in the recipe:
  - override recipe=w4a61: unknown recipe 'w4a61'
    did you mean: w4a16_rtn, w4a16_awq, w4a16_gptq""",
    ),
    "recipe file": (
        ["recipe=./nowhere.yaml"],
        """1 mistake in the recipe:
  - override recipe=./nowhere.yaml: no such recipe file: ./nowhere.yaml""",
    ),
    "algorithm": (
        ["+algorithm@stack.smooth=smoothqaunt"],
        """1 mistake in the recipe:
  - override +algorithm@stack.smooth=smoothqaunt: unknown algorithm 'smoothqaunt'
    did you mean: smoothquant, smooth_attention""",
    ),
    "stage": (
        ["stack.roudn.damp=0.05"],
        """1 mistake in the recipe:
  - override stack.roudn.damp=0.05: unknown stage 'roudn'
    did you mean: round
    to add a stage of that name write +stack.roudn.damp=0.05""",
    ),
    "no model": (
        ["model=hf"],
        """1 mistake in the recipe:
  - conf/model/hf.yaml:2 (override model=hf): model.path: model.path has no value
    set it: model.path=VALUE""",
    ),
    "top key": (
        ["modle.path=x"],
        """1 mistake in the recipe:
  - override modle.path=x: modle: unknown key 'modle'
    did you mean: model""",
    ),
    "leftover of a group": (
        ["recipe=w4a16_rtn", "rules.linear.weight.granularity=channel"],
        """1 mistake in the recipe:
  - override rules.linear.weight.granularity=channel: rules.linear.weight: group_size: 128 is for granularity group, """
        """not channel; to change a scheme's granularity replace the whole spec, e.g. int8:channel:sym""",
    ),
    "rule that selects nothing": (
        ["+rules.extra.weight=int8:channel", "+rules.extra.match={}"],
        """1 mistake in the recipe:
  - override +rules.extra.match={}: rules.extra.match: selects nothing: give name, type or layers; name: '*' means """
        """every module""",
    ),
    "several at once": (
        ["calibration.samples=many", "evaluation.tokens=true", "model.dtype=int8", "name=../x", "runtime.device=tpu"],
        """5 mistakes in the recipe:
  - override name=../x: name: '../x' is not allowed here
    use letters, digits, _, - and dots: it becomes the name of a folder
  - override model.dtype=int8: model.dtype: unknown value 'int8'
    there is: float32, bfloat16, float16
  - override calibration.samples=many: calibration.samples: 'many' is wrong here: a whole number is expected
  - override evaluation.tokens=true: evaluation.tokens: true is wrong here: a whole number is expected
  - override runtime.device=tpu: runtime.device: 'tpu' is not allowed here
    use auto, cpu, mps, cuda or cuda:N""",
    ),
    "not an override": (
        ["stack.round=[", "calibration.seed=1,2"],
        """2 mistakes in the recipe:
  - override stack.round=[: cannot be parsed
    write key=value, +key=value to add, ~key to remove; quote a value with special characters: 'key="..."'
  - override calibration.seed=1,2: gives several values where one is needed
    write a list as key=[a,b], or quote one value with a comma in it: 'key="a,b"'""",
    ),
    "nothing to remove": (
        ["~stack.rond"],
        """1 mistake in the recipe:
  - override ~stack.rond: there is no 'stack.rond' to remove
    did you mean: ~stack.round, ~stack.ranges""",
    ),
    "there already": (
        ["+model.dtype=float16"],
        """1 mistake in the recipe:
  - override +model.dtype=float16: model.dtype is there already; leave out the + to change it""",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), CASES.values(), ids=CASES.keys())
def test_message_of(overrides, message, refusal):
    assert refusal(*overrides) == message


def test_mistakes_in_a_file_name_its_lines(write_recipe, refusal):
    chosen = write_recipe(
        """# @package _global_
defaults:
  - /scheme@rules.linear: w4a16
  - _self_
rules:
  linear:
    match: {typ: Linear}
    weight: {group_size: 0, dtype: int44}
    weigth: int8:channel
stack:
  round: {rules: linear}
"""
    )
    assert (
        refusal(chosen)
        == """6 mistakes in the recipe:
  - mine.yaml:7: rules.linear.match.typ: unknown key 'typ'
    did you mean: type
  - mine.yaml:8: rules.linear.weight.dtype: unknown dtype 'int44'; did you mean: int4, uint4, int14
  - mine.yaml:8: rules.linear.weight.group_size: 0 is wrong here: Input should be greater than or equal to 1
  - mine.yaml:9: rules.linear.weigth: unknown key 'weigth'
    did you mean: weight
  - mine.yaml:11: stack.round: the key 'algorithm' is missing
    say which algorithm the stage runs, such as algorithm: rtn
  - mine.yaml:11: stack.round.rules: 'linear' is wrong here: a list is expected"""
    )


def test_a_choice_made_twice(write_recipe, refusal):
    chosen = write_recipe("defaults:\n  - w8a16\n  - /scheme@rules.linear: w4a16\n  - _self_\n")
    assert (
        refusal(chosen)
        == """1 mistake in the recipe:
  - mine.yaml:3, recipes/w8a16.yaml:4: scheme@rules.linear is chosen twice
    to change a choice write override /scheme@rules.linear: NAME"""
    )


def test_unknown_scheme_in_a_file(write_recipe, refusal):
    chosen = write_recipe("defaults:\n  - override /model: hf\n  - /scheme@rules.linear: w4a17\n  - _self_\n")
    assert (
        refusal(chosen)
        == """1 mistake in the recipe:
  - mine.yaml:3: unknown scheme 'w4a17'
    did you mean: w4a16, w4a16_asym, w4a8"""
    )
