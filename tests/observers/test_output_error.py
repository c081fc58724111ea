"""The range that serves a module's output: against every range of a fine grid, by the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import build_model
from wrapq import PTQConfig, calibrate, prepare
from wrapq.errors import CalibrationError, PlanError, SpecError
from wrapq.observers.base import Observer, make_observer
from wrapq.observers.output_error import mixed
from wrapq.quant.affine import fake_quantize, range_to_qparams
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.base import QuantModuleBase
from wrapq.wrappers.leaf import Conv, Linear
from wrapq.wrappers.model import iter_quantizers

SPECS = ["int8:tensor:asym", "int4:tensor:asym", "int4:tensor:sym"]


def layer(columns: int = 48, rows: int = 32) -> nn.Linear:
    """One whose first columns hardly count."""
    torch.manual_seed(0)
    made = nn.Linear(columns, rows)
    with torch.no_grad():
        made.weight[:, :4] *= 1e-3
    return made


def batches(columns: int = 48) -> list[Tensor]:
    """Inputs with outliers in the channels that hardly count, and rows of very different size."""
    generator = torch.Generator().manual_seed(1)
    out = [torch.randn(2, 20 + i, columns, generator=generator) for i in range(4)]
    for batch in out:
        batch[..., 2] = batch[..., 2].abs() * 30
        batch[:, 0] *= 0.05
    return out


def observed(text: str, module: nn.Module, data: list[Tensor], first: int = 0) -> Observer:
    spec, wrapper = QuantSpec.parse(f"{text}:output_error"), Linear if isinstance(module, nn.Linear) else Conv
    wrapped = QuantModuleBase.wrap(module, wrapper, {"input": spec}, "layer")
    observer = make_observer(spec)
    observer.consumer = wrapped.point_quantizers()["input"].consumer
    for number, batch in enumerate(data, first):
        observer.batch = number
        observer.update(batch)
    return observer


def lost(x: Tensor, weight: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> float:
    error = fake_quantize(x, *range_to_qparams(low, high, spec), spec).double() - x.double()
    outputs = (x.double() @ weight.double().t()).square().sum(-1)
    return float(((error @ weight.double().t()).square().sum(-1) / outputs).sum())


@pytest.mark.parametrize("text", SPECS)
def test_no_range_of_a_grid_is_much_better(text: str) -> None:
    module, data = layer(), batches()
    observer = observed(text, module, data)
    low, high = observer.bounds()
    rows, spec = torch.cat([batch.flatten(0, 1) for batch in data]), observer.spec
    grid = [step / 24 for step in range(1, 25)]
    pairs = [(f, g) for f in grid for g in grid if f == g or not spec.symmetric]
    best = min(lost(rows, module.weight, f * low, g * high, spec) for f, g in pairs)
    got = lost(rows, module.weight, *observer.range(), spec)
    assert got < 1.25 * best
    assert got < 0.8 * lost(rows, module.weight, low, high, spec), "which the whole range is"


def test_merging_and_order_do_not_matter_and_the_state_continues() -> None:
    module, data = layer(), [torch.cat([batch] * 8, 1) for batch in batches()]  # more rows than it keeps
    whole, merged = observed("int8:tensor:asym", module, data), observed("int8:tensor:asym", module, data[:1])
    merged.merge(observed("int8:tensor:asym", module, data[1:], first=1))
    again = observed("int8:tensor:asym", module, data[:2])
    again.load_state_dict({name: tensor.clone() for name, tensor in again.state_dict().items()})
    for number in (3, 2):
        again.batch = number
        again.update(data[number])
    for other in (merged, again):
        assert all(torch.equal(a, b) for a, b in zip(whole.range(), other.range(), strict=True))
    assert whole.state_dict()["rows"].shape == (512, 49)


@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions(groups: int) -> None:
    torch.manual_seed(0)
    module, data = nn.Conv2d(8, 12, 3, groups=groups), [torch.randn(2, 8, 9, 9) * 2 for _ in range(2)]
    with torch.no_grad():
        module.weight[:, 0] *= 1e-3
    for images in data:  # spikes in the channels that hardly count
        images[:, :: 8 // groups, 4, 4] = 60
    observer = observed("int8:tensor:asym", module, data)
    low, high = observer.range()
    assert float(high) < 60 and float(low) < 0 < float(high)


def test_many_outputs_are_mixed_to_few() -> None:
    torch.manual_seed(0)
    weight, errors = torch.randn(4096, 64), torch.randn(100, 64)
    exact, near = ((errors @ w).square().sum(-1) for w in (weight.t(), mixed(weight)))
    assert mixed(weight).shape == (64, 512)
    assert float((near / exact - 1).abs().mean()) < 0.1


def test_layers_that_run_as_one_get_one_range(token_batches: list[Tensor]) -> None:
    config = PTQConfig(weight=None, activation="int8:tensor:asym:output_error", overrides={"lm_head": None})
    model = prepare(build_model("llama"), config)
    calibrate(model, token_batches, stack={"ranges": "ranges"})
    ranges = {point.where: (float(point.scale), int(point.zero_point)) for point in iter_quantizers(model)}
    layer = "model.layers.1"
    assert len({ranges[f"{layer}.self_attn.{name}_proj.input"] for name in "qkv"}) == 1
    assert ranges[f"{layer}.mlp.gate_proj.input"] == ranges[f"{layer}.mlp.up_proj.input"]


def test_what_it_cannot_do_is_refused_beforehand() -> None:
    with pytest.raises(SpecError, match="of granularity tensor"):
        make_observer(QuantSpec.parse("int8:channel@-1:output_error"))
    config = PTQConfig(weight=None, overrides={"*norm": {"output": "int8:tensor:asym:output_error"}})
    with pytest.raises(PlanError, match="for inputs that a weight multiplies, and output is none; take mse"):
        prepare(build_model("llama"), config)
    with pytest.raises(PlanError, match="and weight is none"):
        prepare(build_model("llama"), PTQConfig(weight="int8:tensor:sym:output_error"))


def test_bad_data_is_named() -> None:
    observer = observed("int8:tensor:asym", layer(), [torch.full((1, 4, 48), torch.nan)])
    with pytest.raises(CalibrationError, match="the data holds NaN"):
        observer.qparams("layer.input")
