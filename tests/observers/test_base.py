import pytest
import torch

from wrapq.errors import SpecError, UnknownNameError
from wrapq.observers.base import OBSERVERS, make_observer, observe_tensor
from wrapq.quant.spec import QuantSpec


def test_every_observer_is_found_by_name():
    assert list(OBSERVERS) == ["compare", "ema", "entropy", "minmax", "mse", "output_error", "percentile"]


def test_an_unknown_observer_is_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean: percentile"):
        make_observer(QuantSpec.parse("int8:tensor:percentil"))


def test_a_misspelt_option_is_refused_with_the_nearest():
    with pytest.raises(SpecError, match="did you mean: percentile"):
        make_observer(QuantSpec.parse("int8:tensor:percentile(percentil=99)"))


@pytest.mark.parametrize(
    "observer",
    [
        "ema(momentum=1.0)",
        "ema(momentum=-0.1)",
        "ema(momentum=fast)",
        "percentile(percentile=50)",
        "percentile(percentile=101)",
        "percentile(percentile=high)",
        "percentile(bins=1000)",
        "percentile(bins=8)",
        "percentile(bins=true)",
        "mse(norm=0)",
        "mse(grid=1)",
        "mse(grid=2.5)",
        "mse(max_shrink=1.0)",
        "mse(max_shrink=0)",
    ],
)
def test_an_option_out_of_bounds_is_refused(observer: str):
    name = observer.partition("(")[2].partition("=")[0]
    with pytest.raises(SpecError, match=f"{name} is "):
        make_observer(QuantSpec.parse(f"int8:tensor:{observer}"))


@pytest.mark.parametrize("text", ["int8:token:dyn", "int8:tensor:dyn"])
def test_a_dynamic_spec_has_no_observer(text: str):
    with pytest.raises(SpecError, match="dynamic"):
        make_observer(QuantSpec.parse(text))


def test_a_group_size_that_does_not_divide_the_width():
    with pytest.raises(SpecError, match="group size 7 does not divide the width 24"):
        observe_tensor(torch.randn(2, 24), QuantSpec.parse("int4:g7"), "weight")
