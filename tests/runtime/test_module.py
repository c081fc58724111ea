"""The module that remains: what it holds, what it gives back, how it is copied and moved."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from wrapq import PTQConfig, convert, prepare
from wrapq.quant.packing import unpack
from wrapq.runtime.module import QuantizedModule
from wrapq.runtime.stand_in import combined_class, original_class, shadow


def quantized(
    weight: str = "int4:g8:sym", activation: str | None = "uint8:tensor:asym"
) -> tuple[nn.Linear, QuantizedModule]:
    layer = nn.Linear(16, 12).requires_grad_(False)
    prepared = prepare(layer, PTQConfig(weight=weight, activation=None, activations=activation))
    prepared(torch.randn(5, 16))
    return layer, convert(prepared)


@pytest.mark.parametrize(
    "spec", ["int2:channel", "int3:tensor", "uint4:g4:asym", "int4:g8", "int5:channel", "int16:channel"]
)
def test_the_weight_is_the_dequantized_integers(spec: str):
    layer, module = quantized(spec)
    bits = module.specs["weight"].dtype.bits
    assert module.weight_packed.dtype == torch.int32 and module.weight_packed.shape == (12, -(-16 * bits // 32))
    assert module.weight_shape.tolist() == [12, 16]
    integers = unpack(module.weight_packed, module.specs["weight"].dtype, 16)
    assert torch.equal(module.weight, module.qparams("weight").dequantize(integers, torch.float32))
    assert torch.equal(integers, module.qparams("weight").quantize(layer.weight))


def test_no_float_weight_remains():
    layer, module = quantized()
    assert "weight" not in dict(module.named_parameters())
    assert torch.equal(module.bias, layer.bias)
    held = {t.data_ptr() for t in (*module.parameters(), *module.buffers())}
    assert layer.weight.data_ptr() not in held
    assert not any(isinstance(value, nn.Module) for value in vars(module).values())


@pytest.mark.parametrize("activation", [None, "int8:token:dyn", "int16:tensor:sym", "uint8:tensor:asym"])
def test_only_the_parameters_that_are_needed(activation: str | None):
    _, module = quantized("int8:channel:sym", activation)
    names = set(module.state_dict()) - {"weight_packed", "weight_shape", "weight_scale", "bias"}
    expected = {
        "int16:tensor:sym": {"input_scale", "output_scale"},
        "uint8:tensor:asym": {"input_scale", "input_zero_point", "output_scale", "output_zero_point"},
    }
    assert names == expected.get(activation, set())


def test_copies_and_devices():
    _, module = quantized()
    x = torch.randn(3, 16)
    expected = module(x)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    assert torch.equal(module.to("cpu")(x), expected)
    meta = copy.deepcopy(module).to("meta")
    assert meta.weight_packed.is_meta and meta.weight.shape == (12, 16)
    other = quantized()[1]
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), expected)


def stored(module: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    """The dtype and the bytes of everything but the bias."""
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items() if name != "bias"}
    return {name: (t.dtype, t.flatten().view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.type(torch.half)])
@pytest.mark.parametrize("weight", ["int4:g8:sym", "uint4:g8:asym", "int8:g8:scale=bfloat16", "nvfp4", "mxfp4"])
def test_another_dtype_is_computed_in_and_changes_no_scale(weight: str, cast: Callable[[nn.Module], nn.Module]):
    layer = nn.Linear(32, 12).requires_grad_(False)
    prepared = prepare(layer, PTQConfig(weight=weight, activations="int8:tensor:asym"))
    prepared(torch.randn(5, 32))
    module = convert(prepared)
    before, values, x = stored(module), module.weight, torch.randn(3, 32)
    expected = module(x)
    assert stored(cast(module)) == before
    dtype = module.bias.dtype
    assert dtype != torch.float32 and module.weight.dtype == dtype
    assert torch.equal(module.weight, values.to(dtype))
    y = module(x.to(dtype))
    assert y.dtype == dtype and (y - expected).norm() < 0.05 * expected.norm()
    assert torch.equal(module.float().weight, values)


def test_gradients_reach_the_input_side_nothing_else():
    _, module = quantized()
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_it_prints_its_specs():
    assert "weight=int4:g8:sym, input=uint8:tensor:asym" in repr(quantized()[1])


def test_shadow_shares_tensors_and_has_tables_of_its_own():
    layer = nn.Linear(4, 3)
    cls = combined_class("Other", QuantizedModule, nn.Linear)
    assert cls is combined_class("Other", QuantizedModule, nn.Linear) and cls.__name__ == "OtherLinear"
    other = shadow(layer, cls)
    assert (
        type(other) is cls and type(layer) is nn.Linear and original_class(other) is original_class(layer) is nn.Linear
    )
    assert other._parameters["weight"] is layer.weight
    other.register_buffer("extra", torch.ones(1))
    del other._parameters["bias"]
    assert "extra" not in dict(layer.named_buffers()) and layer.bias is not None
