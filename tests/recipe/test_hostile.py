"""A recipe comes from a stranger: it is data, and it sets nothing but the experiment."""

import os

import pytest

BAD_FILES = {
    "target": ("model: {_target_: os.system}", "mine.yaml:1: model._target_: _target_ is not allowed"),
    "partial": ("rules:\n  a:\n    _partial_: true", "mine.yaml:3: rules.a._partial_: _partial_ is not allowed"),
    "environment": ("model:\n  path: ${oc.env:HOME}", "mine.yaml:2: model.path: '${oc.env:HOME}' is not allowed"),
    "nested": ("model:\n  path: ${model.${name}}", "mine.yaml:2: model.path: '${model.${name}}' is not allowed"),
    "environment in defaults": ("defaults:\n  - /model: ${oc.env:HOME}", "without ${...} and without .."),
    "outside": ("defaults:\n  - /model@x: ../../etc/passwd", "without ${...} and without .."),
    "python tag": ("model: !!python/object/apply:os.system [x]", "mine.yaml:1: YAML tags such as"),
    "custom tag": ("model: !x {path: a}", "mine.yaml:1: YAML tags such as !x"),
    "anchor bomb": ("a: &a [x]\nb: [*a, *a]", "mine.yaml:1: YAML anchors and aliases are not allowed"),
    "merge key": ("model:\n  <<: {path: x}", "mine.yaml:2: YAML merge keys"),
    "huge": ("# " + "x" * (1 << 20), "mine.yaml: larger than 1 MiB"),
    "deep": ("a: " + "[" * 500 + "]" * 500, "mine.yaml:1: nested deeper than 32 levels"),
    "not UTF-8": (b"name: \xff\xfe", "mine.yaml: not UTF-8 text (byte 6)"),
    "control characters": ("name: \0", "mine.yaml: not valid YAML"),
    "two documents": ("name: a\n---\nname: b", "mine.yaml:2: holds several YAML documents"),
    "twice": ("name: a\nname: b", "mine.yaml:2: the key 'name' is written twice"),
    "list": ("- a", "mine.yaml: a preset is a mapping"),
    "paths": ("name: x\npaths: {outputs: /}", "mine.yaml:2: paths: paths belongs to the machine"),
    "tracking": ("tracking: {uri: 'http://evil'}", "mine.yaml:1: tracking: tracking belongs to the machine"),
    "runtime": ("runtime: {trust_remote_code: true}", "mine.yaml:1: runtime: runtime belongs to the machine"),
    "runtime by defaults": ("defaults:\n  - override /runtime: cpu", "mine.yaml:2: defaults: runtime belongs"),
    "paths by package": ("defaults:\n  - /model@paths: demo", "mine.yaml:2: defaults: paths belongs"),
    "paths by file": ("defaults:\n  - /tracking/none@model", "mine.yaml:2: defaults: tracking belongs"),
    "package header": ("# @package runtime\nname: x", "mine.yaml: # @package runtime is not allowed here"),
    "hydra": ("hydra: {run: {dir: /tmp}}", "mine.yaml:1: hydra: unknown key 'hydra'"),
    "includes itself": ("defaults:\n  - mine\n  - _self_", "include each other"),
    "defaults": ("defaults: {model: hf}", "mine.yaml:1: defaults: defaults must be a list"),
    "defaults entry": ("defaults:\n  - 3", "3 is no entry of a defaults list"),
    "reference to itself": ("name: ${description}\ndescription: ${name}", "refers to itself"),
    "reference to nothing": ("name: ${nothing.here}", "${nothing.here} names no key"),
    "folder name": ("name: ../../x", "mine.yaml:1: name: '../../x' is not allowed here"),
    "dots": ("name: a..b", "two dots"),
    "rule name": ("rules: {'../x': {match: {name: '*'}}}", "'../x' is no name"),
    "empty": ("rules: {a: null}", "null is wrong here: a mapping of keys to values is expected"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_hostile_file_is_refused(text, message, write_recipe, refusal):
    assert message in refusal(write_recipe(text))


def test_files_that_include_each_other_over_and_over_end(write_recipe, refusal):
    for level in range(30):
        write_recipe(f"defaults:\n  - level{level + 1}@a\n  - level{level + 1}@b\n  - _self_", f"level{level}.yaml")
    write_recipe("name: x", "level30.yaml")
    assert "pull in more than 2000 files" in refusal("recipe=./level0.yaml")


def test_a_reference_bomb_ends(write_recipe, refusal):
    keys = "\n".join(f"  k{i}: ${{calibration.k{i + 1}}}${{calibration.k{i + 1}}}" for i in range(19))
    assert "longer than" in refusal(write_recipe(f"calibration:\n{keys}\n  k19: {'x' * 100}\n"))


@pytest.mark.parametrize("name", ["../../../etc/passwd", "a/../../b", "%2e%2e", "\\..\\x", "x" * 5000])
def test_a_name_never_leaves_the_folders(name, refusal):
    assert "mistake" in refusal(f"recipe='{name}'")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(write_recipe, refusal, tmp_path):
    chosen = write_recipe("name: x")
    (tmp_path / "mine.yaml").chmod(0)
    assert "mine.yaml: cannot be read" in refusal(chosen)


def test_only_the_command_line_allows_code_of_a_model(tmp_path, refusal):
    from wrapq.errors import RecipeError
    from wrapq.recipe.compose import compose

    (tmp_path / "conf" / "runtime").mkdir(parents=True)
    (tmp_path / "conf" / "runtime" / "mine.yaml").write_text("trust_remote_code: true\n")
    with pytest.raises(RecipeError, match="only the command line may allow a model's own code to run"):
        compose(["runtime=mine"], [tmp_path])
    assert compose(["runtime.trust_remote_code=true"]).settings.runtime.trust_remote_code
    assert not compose([]).settings.runtime.trust_remote_code


@pytest.mark.parametrize(
    "override",
    ["model.path='${oc.env:HOME}'", "+model._target_=os.system", "+rules.a={match: {_target_: x}}", "hydra.run.dir=x"],
)
def test_a_hostile_override_is_refused(override, refusal):
    assert refusal(override).startswith("1 mistake")
