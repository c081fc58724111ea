from typing import Literal

import jsonschema
import pytest
import yaml
from hypothesis import given
from pydantic import BaseModel

from tests.quant.strategies import specs
from wrapq.algorithms.fold_norms import FoldOptions
from wrapq.algorithms.gptq import GPTQOptions
from wrapq.algorithms.rotate import RotateOptions
from wrapq.algorithms.smoothquant import SmoothQuantOptions
from wrapq.observers.base import OBSERVERS
from wrapq.quant.dtypes import DTYPES
from wrapq.quant.short_form import ALIASES, PARTS
from wrapq.quant.spec import QuantSpec
from wrapq.recipe.json_schema import recipe_schema
from wrapq.recipe.presets import list_presets


class Inner(BaseModel):
    depth: int = 1


class Gptq(GPTQOptions):
    order: Literal["act", "none"] = "none"
    inner: Inner = Inner()


class Text(BaseModel):
    path: str
    split: str = "calib"


class Empty(BaseModel):
    pass


TRANSFORMS = {"smoothquant": SmoothQuantOptions, "fold_norms": FoldOptions, "rotate": RotateOptions}
SCHEMA = recipe_schema(
    {"gptq": Gptq, "rtn": Empty, "ranges": Empty, **TRANSFORMS},
    {"text": Text, "demo": Text},
    observers={name: OBSERVERS.get(name).Options for name in OBSERVERS},
)


SPEC = jsonschema.Draft202012Validator({"$defs": SCHEMA["$defs"], "$ref": "#/$defs/Spec"})


def mistakes(text: str) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return sorted(error.json_path for error in validator.iter_errors(yaml.safe_load(text)))


def test_it_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("preset", [p for p in list_presets() if p.kind == "recipe"], ids=lambda p: p.name)
def test_shipped_recipes_are_valid(preset):
    assert mistakes(preset.path.read_text()) == []


@pytest.mark.parametrize("preset", [p for p in list_presets() if p.kind == "scheme"], ids=lambda p: p.name)
def test_shipped_schemes_are_valid_rules(preset):
    assert mistakes(yaml.safe_dump({"rules": {"some": yaml.safe_load(preset.path.read_text())}})) == []


@given(specs())
def test_every_short_form_is_valid(spec: QuantSpec):
    assert list(SPEC.iter_errors(str(spec))) == []


@pytest.mark.parametrize("word", ["int8:channl@1", "int9x", "int8:group", "int8:channel:", "int8 channel", "floats"])
def test_what_no_parser_would_take_is_no_short_form(word):
    with pytest.raises(ValueError):
        QuantSpec.parse(word)
    assert list(SPEC.iter_errors(word)) != []


def test_the_short_form_is_described_by_the_parser():
    said = SCHEMA["$defs"]["Spec"]["anyOf"][0]["description"]
    assert all(part in said for part in (*PARTS, *ALIASES))


@pytest.mark.parametrize(
    "text",
    [
        "stack: {round: {algorithm: gptq, damp: 0.1, order: act, inner: {depth: 2}}}",
        "stack: {round: {damp: 0.1}}",
        "rules: {a: {weight: {group_size: 64, observer: {name: mse, grid: 10}}, input: float}}",
        "rules: {a: {weight: {observer: {name: percentile, percentile: 99, bins: 64}}}}",
        "rules: {a: {weight: {observer: {compare: [minmax, mse], choose: mse}}}}",
        "calibration: {samples: 3, split: x}",
        "defaults: [override /model: hf, _self_]",
    ],
)
def test_what_is_right_passes(text):
    assert mistakes(text) == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("stack: {round: {algorithm: rtn, damp: 0.1}}", "$.stack.round"),
        ("stack: {round: {algorithm: gptq, order: up}}", "$.stack.round.order"),
        ("stack: {round: {dmap: 0.1}}", "$.stack.round"),
        ("rules: {a: {weigth: int8}}", "$.rules.a"),
        ("rules: {a: {weight: 'int8:chan nel'}}", "$.rules.a.weight"),
        ("rules: {a: {weight: {weight_bit: 8}}}", "$.rules.a.weight"),
        ("rules: {a: {weight: {observer: {name: mse, gird: 10}}}}", "$.rules.a.weight"),
        ("rules: {a: {weight: {observer: {name: ema, grid: 10}}}}", "$.rules.a.weight"),
        ("rules: {a: {weight: {observer: {name: percentile, percentile: 101}}}}", "$.rules.a.weight"),
        ("calibration: {source: demo, pth: x}", "$.calibration"),
        ("paths: {outputs: x}", "$"),
    ],
)
def test_what_is_wrong_is_underlined(text, place):
    assert place in mistakes(text)


def test_observers_and_dtypes_are_those_of_the_registries():
    fields = SCHEMA["$defs"]["SpecFields"]["properties"]
    assert fields["observer"]["examples"] == SCHEMA["$defs"]["ObserverChoice"]["properties"]["name"]["examples"]
    assert fields["observer"]["examples"] == list(OBSERVERS)
    assert all(name in fields["dtype"]["description"] for name in DTYPES)


def test_every_key_is_described():
    for name in ("Rule", "Match", "Stage", "Calibration", "Evaluation", "ModelConfig", "SpecFields"):
        for key, value in SCHEMA["$defs"][name]["properties"].items():
            assert "description" in value or key in ("damp", "order", "inner", "path", "split"), f"{name}.{key}"
