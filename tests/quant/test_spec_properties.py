import pytest
from hypothesis import given

from tests.quant.strategies import specs
from wrapq.errors import SpecError
from wrapq.quant.short_form import ALIASES
from wrapq.quant.spec import QuantSpec


@given(specs())
def test_parsing_what_was_printed_gives_the_same_spec(spec: QuantSpec):
    assert QuantSpec.parse(str(spec)) == spec
    assert str(QuantSpec.parse(str(spec))) == str(spec)


@given(specs())
def test_the_mapping_form_gives_the_same_spec(spec: QuantSpec):
    assert QuantSpec.from_fields(spec.fields()) == spec


@given(specs())
def test_equal_specs_have_equal_hashes(spec: QuantSpec):
    assert hash(QuantSpec.parse(str(spec))) == hash(spec)


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_is_what_it_stands_for_and_takes_further_parts(name: str):
    assert QuantSpec.parse(name) == QuantSpec.parse(ALIASES[name])
    part = "mse" if name.endswith("_k") else "dyn"  # whose scales are fixed
    assert QuantSpec.parse(f"{name}:{part}") == QuantSpec.parse(f"{ALIASES[name]}:{part}")
    assert QuantSpec.parse(str(QuantSpec.parse(name))) == QuantSpec.parse(name)
    with pytest.raises(SpecError, match="says the granularity itself"):
        QuantSpec.parse(f"{name}:tensor")


def test_the_comparison_of_observers_as_a_mapping():
    spec = QuantSpec.from_fields({"dtype": "int8", "observer": {"compare": ["minmax", "mse"], "choose": "best"}})
    assert str(spec) == "int8:tensor:sym:compare(choose=best,of=minmax+mse)"
    assert QuantSpec.from_fields(spec.fields()) == spec


def test_two_granularities_are_refused():
    for text in ("int8:channel:g8", "int8:g8:channel", "int8:g8:b2x2", "int8:channel@1:token", "int8:g8:g16"):
        with pytest.raises(SpecError, match="twice"):
            QuantSpec.parse(text)
