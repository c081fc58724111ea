"""Wrapping, undoing and converting a model as a whole: all or nothing."""

import pytest
import torch
from torch import nn

from wrapq import PTQConfig, convert, prepare, restore
from wrapq.algorithms.rtn import RTN
from wrapq.calibration.assignments import Assignments
from wrapq.calibration.walker import Walker
from wrapq.errors import LifecycleError, ModelError, SpecError, UnknownNameError
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.model import convert_model, iter_quantizers, iter_wrapped, unwrap_model, wrap_model

INT8 = QuantSpec.parse("int8:tensor:asym")


class Nested(nn.Module):
    """A block with children, one of which stands at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(4, 4), nn.ReLU()
        self.inner = nn.Sequential(nn.Linear(4, 4), self.act, nn.BatchNorm1d(4))
        self.same = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.same(self.inner(self.act(self.first(x))))


def objects(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


@pytest.mark.parametrize(
    ("specs", "error", "match"),
    [
        ({"first": {"input": INT8}, "frist": {"input": INT8}}, LifecycleError, "no module 'frist'"),
        (
            {"first": {"input": INT8}, "act": {"middle": INT8}},
            LifecycleError,
            "no point 'middle'; it has: input, output",
        ),
        (
            {"first": {"input": INT8}, "inner.2": {"input": INT8}},
            ModelError,
            r"no wrapper for inner\.2 \(BatchNorm1d\)",
        ),
        (
            {"first": {"input": INT8}, "act": {"input": QuantSpec.parse("int8:tensor:nosuch")}},
            UnknownNameError,
            "nosuch",
        ),
        (
            {"first": {"input": INT8}, "act": {"input": QuantSpec.parse("int8:tensor:percentile(percentile=7000)")}},
            SpecError,
            "percentile",
        ),
    ],
    ids=["unknown module", "unknown point", "no wrapper", "unknown observer", "bad option"],
)
def test_a_failure_leaves_the_model_as_it_was(specs, error, match):
    model = Nested()
    before = objects(model)
    with pytest.raises(error, match=match):
        wrap_model(model, specs)
    assert objects(model) == before
    assert wrap_model(model, {"first": {"input": INT8}}) is model


def test_a_module_at_two_places_stays_one_module():
    model, x = Nested().eval(), torch.randn(5, 4)
    before, expected = objects(model), model(x)
    prepared = prepare(model, PTQConfig(weight="int16:channel", activations="int16:tensor"))
    assert prepared.same is prepared.first and prepared.inner[1] is prepared.act
    assert [name for name, _ in iter_wrapped(prepared)] == ["first", "act", "inner.0"]
    assert torch.equal(prepared(x), expected)
    assert objects(restore(prepared)) == before
    prepared = prepare(model, PTQConfig(weight="int16:channel", activations="int16:tensor"))
    prepared(x)
    converted = convert(prepared)
    assert converted.same is converted.first and converted.inner[1] is converted.act
    torch.testing.assert_close(converted(x), expected, rtol=1e-2, atol=1e-2)


def test_prepared_twice_and_converted_twice():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    prepared = prepare(model)
    with pytest.raises(LifecycleError, match="prepared already"):
        prepare(prepared)
    prepared(torch.randn(3, 4))
    converted = convert(prepared)
    with pytest.raises(LifecycleError, match="converted already"):
        prepare(converted, PTQConfig(weight=None))
    with pytest.raises(LifecycleError, match="nothing to convert"):
        convert(converted)
    with pytest.raises(LifecycleError, match="nothing to restore"):
        restore(converted)


def test_hooks_and_attributes_stay():
    layer = nn.Linear(4, 4)
    layer.note = "mine"
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(layer)
    prepared = prepare(model)
    assert prepared[0].note == "mine" and isinstance(prepared[0], nn.Linear)
    prepared(torch.randn(2, 4))
    converted = convert(prepared)
    assert converted[0].note == "mine" and isinstance(converted[0], nn.Linear)
    converted(torch.randn(2, 4))
    assert len(calls) == 2


def test_undo_after_calibration_and_rounding():
    model = Nested().eval()
    before, x = objects(model), torch.randn(5, 4)
    expected = model(x)
    prepared = prepare(model)
    prepared(x)
    for quantizer in iter_quantizers(prepared):
        if not quantizer.where.endswith("weight"):
            quantizer.freeze()
    assert not torch.equal(prepared(x), expected)
    assert objects(unwrap_model(prepared)) == before and torch.equal(model(x), expected)


def test_a_conversion_that_frees_lets_each_weight_go_and_gives_the_same():
    def made() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
        model[1].weight = model[0].weight
        return prepare(model, PTQConfig("int8:channel", None))

    freed, kept = made(), made()
    for model in (freed, kept):
        weights = {name: RTN() for name in (q.where for q in iter_quantizers(model))}
        Walker(model, Assignments(weights)).run([], "parallel")
    wrapped = dict(iter_wrapped(freed))
    x = torch.randn(3, 4)
    expected, got = convert_model(kept)(x), convert_model(freed, frees=True)(x)
    assert torch.equal(got, expected) and freed[0].weight_packed is freed[1].weight_packed
    assert all(module.weight_quantizer.integers is None for module in wrapped.values())
    assert {module.float_weight().untyped_storage().nbytes() for module in wrapped.values()} == {4}
