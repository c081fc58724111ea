import pytest
import torch

from tests.contracts.observer import ObserverContract, batches
from wrapq.errors import SpecError, UnknownNameError
from wrapq.observers.base import make_observer, observe_tensor
from wrapq.quant.spec import QuantSpec

NAMES = ("minmax", "percentile", "mse")


class TestCompare(ObserverContract):
    name = "compare"
    options = "(of=minmax+percentile+mse)"


def spec(text: str, **options: object) -> QuantSpec:
    return QuantSpec.from_fields(QuantSpec.parse(text).fields() | {"observer": {"compare": list(NAMES), **options}})


def outliers() -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(64, 512)
    x[3, 5], x[9, 100] = 80, -90
    return x


@pytest.mark.parametrize("text", ["int8:tensor", "int4:channel@-1", "uint4:tensor:asym", "int4:g8", "fp4_e2m1:tensor"])
def test_each_observer_gets_the_range_it_has_alone_and_the_best_is_taken(text: str):
    compared = make_observer(spec(text))
    alone = {name: make_observer(QuantSpec.parse(f"{text}:{name}")) for name in NAMES}
    for batch in batches():
        for observer in (compared, *alone.values()):
            observer.update(batch)
    for name in NAMES:
        picked = make_observer(spec(text, choose=name))
        picked.load_state_dict(compared.state_dict())
        for got, expected in zip(picked.range(), alone[name].range(), strict=True):
            assert torch.equal(got, expected)
    data = torch.cat([batch.flatten(0, 1) for batch in batches()])
    errors = {n: (o.qparams("x").fake_quantize(data) - data).square().mean() for n, o in alone.items()}
    best = (compared.qparams("x").fake_quantize(data) - data).square().mean()
    assert float(best) <= min(map(float, errors.values())) * 1.1
    assert sum(entry["chosen"] for entry in compared.report().values()) == pytest.approx(1)


@pytest.mark.parametrize("text", ["int4:tensor", "int4:channel", "int4:g32", "mxfp4", "nvfp4"])
def test_the_errors_reported_for_a_weight_are_the_true_ones(text: str):
    w = outliers()
    observer = make_observer(spec(text))
    observer.tensor_range(w)
    for name, entry in observer.report().items():
        alone = observe_tensor(w, QuantSpec.parse(f"{text}:{name}"), "w")
        assert entry["mse"] == pytest.approx(float((alone.fake_quantize(w) - w).square().mean()), rel=1e-3)
    best = observe_tensor(w, spec(text), "w")
    error = float((best.fake_quantize(w) - w).square().mean())
    assert error <= min(entry["mse"] for entry in observer.report().values()) * 1.01


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UnknownNameError):
        make_observer(QuantSpec.parse("int8:tensor:compare(of=minmax+nothing)"))
    for options in ("of=minmax+minmax", "of=compare", "of=minmax,choose=mse"):
        with pytest.raises(SpecError):
            make_observer(QuantSpec.parse(f"int8:tensor:compare({options})"))
