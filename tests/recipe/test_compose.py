import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wrapq.errors import RecipeError
from wrapq.recipe.compose import compose
from wrapq.recipe.dump import to_yaml
from wrapq.recipe.presets import list_presets

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = [preset.name for preset in list_presets() if preset.kind == "recipe"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_composes_and_survives_its_dump(name, tmp_path):
    composed = compose([f"recipe={name}"])
    assert composed.recipe.name == name
    assert composed.recipe.description
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(to_yaml(composed.recipe))
    again = compose([f"recipe={dumped}"])
    assert again.recipe == composed.recipe
    assert list(again.recipe.rules) == list(composed.recipe.rules)
    assert again.recipe.digest() == composed.recipe.digest()


def test_the_default_is_demo():
    assert compose().recipe == compose(["recipe=demo"]).recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_file_says_how_to_run_it(name):
    first = (REPOSITORY / "recipes" / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# wrapq run") and (name in first or name == "demo")


def test_every_leaf_knows_what_set_it():
    composed = compose(["recipe=w4a16_rtn", "model=hf", "model.path=x", "stack.round.damp=0.05", "scheme=w8a8"])
    said = {key: str(source) for key, source in composed.sources.items()}
    assert said["name"] == "recipes/w4a16_rtn.yaml:8"
    assert said["rules.linear.match.type"] == "recipes/w4a16_rtn.yaml:13"
    assert said["rules.linear.weight"] == "conf/scheme/w8a8.yaml:2 (override scheme=w8a8)"
    assert said["stack.round.algorithm"] == "conf/algorithm/rtn.yaml:2"
    assert said["stack.round.damp"] == "override stack.round.damp=0.05"
    assert said["model.path"] == "override model.path=x"
    assert said["model.dtype"] == "conf/model/hf.yaml:3 (override model=hf)"
    assert said["calibration.samples"] == "conf/config.yaml:16"
    assert said["paths.outputs"] == "conf/paths/default.yaml:2"
    assert "stack_order" not in composed.sources


def test_the_last_writer_is_the_source(write_recipe):
    chosen = write_recipe(
        "defaults:\n  - /recipe/w4a16_rtn\n  - _self_\ncalibration:\n  samples: 3\nmodel: {path: y}\n"
    )
    composed = compose([chosen, "model.path=z"])
    assert composed.recipe.calibration.samples == 3
    assert str(composed.sources["calibration.samples"]) == "mine.yaml:5"
    assert str(composed.sources["model.path"]) == "override model.path=z"
    assert str(composed.sources["rules.head.quantize"]) == "recipes/w4a16_rtn.yaml:14"
    assert composed.recipe.name == "w4a16_rtn"


def test_the_example_of_the_design_composes(write_recipe):
    # Hydra alone wants the overrides of a defaults list at its end; here they may stand where they read best
    chosen = write_recipe(
        """# @package _global_
defaults:
  - override /model: hf
  - override /calibration: text
  - /scheme@rules.linear: w4a16
  - /algorithm@stack.round: rtn
  - _self_
name: mine
rules:
  first: {match: {name: "*"}, quantize: false}
  linear: {match: {type: Linear}}
  head: {match: {name: lm_head}, quantize: false}
calibration: {samples: 128, seq_len: 2048, schedule: sequential}
"""
    )
    recipe = compose([chosen, "model.path=x", "calibration.path=y"]).recipe
    assert list(recipe.rules) == ["first", "linear", "head"]
    assert recipe.rules["linear"].weight == "int4:g128:sym"
    assert (recipe.calibration.source, recipe.calibration.options) == ("text", {"path": "y"})


def test_a_recipe_without_name_is_called_by_its_file(write_recipe):
    assert compose([write_recipe("description: x", "team/other.yaml")]).recipe.name == "other"


def test_a_mapping_patches_a_spec_and_a_word_replaces_it():
    def weight(*overrides: str) -> object:
        return compose(["recipe=w4a16_rtn", *overrides]).recipe.rules["linear"].weight

    assert weight("rules.linear.weight.observer=mse") == "int4:g128:sym:mse"
    assert weight("rules.linear.weight.group_size=64") == "int4:g64:sym"
    assert weight("rules.linear.weight={group_size: 32, symmetric: false}") == "int4:g32:asym"
    assert weight("rules.linear.weight=int8:channel") == "int8:channel"
    assert weight("rules.linear.weight.group_size=64", "rules.linear.weight=int8:channel") == "int8:channel"
    assert weight("rules.linear.weight=float") == "float"
    assert weight("rules.linear.weight=float", "rules.linear.weight.observer=mse") == {"observer": "mse"}


def test_a_patch_without_a_scheme_stays_a_patch():
    recipe = compose(["+rules.more={match: {name: x}, weight: {group_size: 64}}"]).recipe
    assert recipe.rules["more"].weight == {"group_size": 64}
    assert list(recipe.rules)[-1] == "more"


def test_a_bare_scheme_means_the_one_rule_that_takes_it():
    short = compose(["recipe=w4a16_rtn", "scheme=w8a16"]).recipe
    assert short == compose(["recipe=w4a16_rtn", "scheme@rules.linear=w8a16"]).recipe
    assert short.rules["linear"].weight == "int8:g128:sym"


def test_entries_are_added_and_removed():
    recipe = compose(["+algorithm@stack.more=rtn", "~rules.mlp", "~algorithm@stack.ranges"]).recipe
    assert list(recipe.stack) == ["round", "more"]
    assert list(recipe.rules) == ["linear", "head"]


def test_a_stage_named_for_an_option_stays_where_it_was(tmp_path):
    assert list(compose(["recipe=w4a4_rotated_gptq"]).recipe.stack) == ["fold", "rotate", "round"]
    head = "defaults:\n  - /algorithm@stack.fold: fold_norms\n  - /algorithm@stack.turn: rotate\n  - _self_\n"
    (tmp_path / "mine.yaml").write_text(head + "stack: {turn: {seed: 1}, fold: {untie: true}}\n")
    assert list(compose([f"recipe={tmp_path}/mine.yaml"]).recipe.stack)[:2] == ["turn", "fold"]


def test_plain_references_are_followed():
    recipe = compose(["evaluation.seq_len='${calibration.seq_len}'", "description='on ${model.path}'"]).recipe
    assert (recipe.evaluation.seq_len, recipe.description) == (256, "on wrapq://demo")


def test_the_digest_is_of_what_decides_the_result():
    base = compose(["recipe=w8a16"]).recipe.digest()
    assert compose(["recipe=w8a16", "name=x", "description=y", "paths.outputs=z"]).recipe.digest() == base
    assert compose(["recipe=w8a16", "seed=1"]).recipe.digest() != base
    assert compose(["recipe=w8a16", "~rules.head"]).recipe.digest() != base


def test_the_digest_sees_the_order_of_rules():
    rules = ["{match: {name: x}, quantize: false}", "{match: {name: y}, quantize: false}"]
    one = compose([f"+rules.a={rules[0]}", f"+rules.b={rules[1]}"]).recipe
    two = compose([f"+rules.b={rules[1]}", f"+rules.a={rules[0]}"]).recipe
    assert one.rules == two.rules and one.digest() != two.digest()


def test_composition_does_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    here = compose(["recipe=w8a8_static"])
    monkeypatch.chdir(tmp_path)
    assert compose(["recipe=w8a8_static"]) == here


def test_no_global_state_of_hydra_is_left():
    from hydra.core.global_hydra import GlobalHydra
    from hydra.version import VersionBase

    before = VersionBase.instance().getbase()
    compose()
    assert not GlobalHydra.instance().is_initialized()
    assert VersionBase.instance().getbase() is before


def test_presets_of_ones_own(tmp_path):
    (tmp_path / "conf" / "scheme").mkdir(parents=True)
    (tmp_path / "recipes" / "team").mkdir(parents=True)
    (tmp_path / "conf" / "scheme" / "w6.yaml").write_text("# Six bits.\nweight: int6:channel:sym\n")
    lists = "defaults:\n  - /recipe/w8a16\n  - override /scheme@rules.linear: w6\n  - _self_\n"
    text = f"{lists}name: six\ndescription: Six bits.\n"
    (tmp_path / "recipes" / "team" / "six.yaml").write_text(text)
    recipe = compose(["recipe=team/six"], [tmp_path]).recipe
    assert (recipe.name, recipe.rules["linear"].weight) == ("six", "int6:channel:sym")
    mine = {(p.kind, p.name): p for p in list_presets([tmp_path]) if p.origin == str(tmp_path)}
    assert set(mine) == {("scheme", "w6"), ("recipe", "team/six")}
    assert {p.description for p in mine.values()} == {"Six bits."}


def test_a_missing_folder_of_presets_is_named(tmp_path):
    with pytest.raises(RecipeError, match="--config-dir: no such folder"):
        compose([], [tmp_path / "nowhere"])


def test_every_preset_has_a_description():
    assert [preset.name for preset in list_presets() if not preset.description] == []


def test_composing_needs_no_torch(tmp_path):
    code = """
import sys
from wrapq.errors import RecipeError
from wrapq.recipe.compose import compose
from wrapq.recipe.presets import list_presets
compose(["recipe=w8a8_static"]); list_presets()
try:
    compose(["scheme=w4a17"])
except RecipeError as error:
    assert "w4a16" in str(error)
heavy = {"torch", "transformers", "mlflow", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


KEYS = st.sampled_from(
    [
        "model",
        "model.path",
        "rules",
        "rules.linear",
        "rules.linear.weight",
        "rules.linear.weight.dtype",
        "rules.linear.points.mul",
        "rules.x",
        "stack",
        "stack.round",
        "stack.round.a.b",
        "scheme",
        "algorithm",
        "recipe",
        "name",
        "calibration",
        "evaluation",
        "tracking",
        "paths",
        "a/b",
        "defaults",
    ]
)
WORDS = [
    "null",
    "???",
    "[1,2]",
    "{a:b}",
    "{1:2}",
    "[{a:{}}]",
    "${name}",
    "${x.y}",
    "int4:g64",
    "int4:token",
    "w8a16",
    "hf",
    "true",
    "3",
    "1e400",
    "nan",
    "[]",
    "{}",
]
VALUES = st.one_of(st.text(max_size=12), st.sampled_from(WORDS))
OVERRIDES = st.one_of(
    st.text(max_size=20),
    st.builds(lambda sign, key, at, value: f"{sign}{key}{at}={value}", st.sampled_from(["", "+", "++", "~"]), KEYS,
              st.sampled_from(["", "@rules.linear", "@stack", ".x"]), VALUES),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(OVERRIDES, min_size=1, max_size=3))
def test_any_overrides_compose_or_are_refused(overrides):
    try:
        compose(overrides)
    except RecipeError as error:
        assert str(error)
