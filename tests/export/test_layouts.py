"""The tensors of a layer are those that compressed-tensors' own compressors make, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import wrapq
from wrapq.errors import SpecError
from wrapq.export.scheme import INT, PACK, cache_args, linear_scheme
from wrapq.export.tensors import linear_tensors
from wrapq.quant.spec import QuantSpec

pytest.importorskip("compressed_tensors")

ROWS, COLUMNS = 40, 96
WEIGHTS = [
    *(f"int{bits}:g32:sym" for bits in range(2, 9)),
    *(f"int{bits}:g32:asym" for bits in range(2, 9)),
    "uint4:g32:asym",
    "uint4:channel:asym",
    "uint8:channel:sym",
    "int8:channel:sym",
    "int4:tensor:sym",
    "int4:tensor:asym",
]


def converted(spec: str, dtype: torch.dtype = torch.float32) -> wrapq.runtime.module.QuantizedWeight:
    torch.manual_seed(3)
    layer = nn.Linear(COLUMNS, ROWS).to(dtype)
    return wrapq.convert(wrapq.prepare(layer, wrapq.PTQConfig(weight=spec, activation=None)))


def theirs(scheme, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What compressed-tensors stores for the weight and parameters that its own reader takes from `tensors`."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    said = QuantizationScheme.model_validate(scheme.group(["Linear"]))
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.compress(compressor.decompress(tensors, said), said)


@pytest.mark.parametrize("spec", WEIGHTS)
def test_a_packed_layer_is_what_their_packer_packs(spec: str) -> None:
    layer = converted(spec)
    scheme = linear_scheme(layer.specs)
    assert scheme.format == PACK
    tensors = linear_tensors(layer, scheme, "layer")
    assert tensors["weight_packed"].shape == (ROWS, -(-COLUMNS * layer.specs["weight"].dtype.bits // 32))
    again = theirs(scheme, tensors)
    assert {name: tensor.dtype for name, tensor in again.items()} == {name: t.dtype for name, t in tensors.items()}
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("spec", [*WEIGHTS, "fp8_e4m3:channel", "fp8_e4m3:tensor", "fp8_e4m3:b32x32"])
@pytest.mark.parametrize("with_input", [False, True])
def test_their_reader_gives_our_weight(spec: str, with_input: bool) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    layer = converted(spec)
    specs = dict(layer.specs)
    if with_input:
        specs["input"] = QuantSpec.parse("int8:token:sym:dyn")
    scheme = linear_scheme(specs)
    whole = ":asym" in spec or layer.specs["weight"].dtype.bits == 8
    assert not with_input or "fp8" in spec or scheme.format == (INT if whole else PACK)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    read = compressor.decompress(
        linear_tensors(layer, scheme, "layer"), QuantizationScheme.model_validate(scheme.group(["Linear"]))
    )
    assert torch.equal(read["weight"], layer.weight)


@pytest.mark.parametrize("spec", ["nvfp4", "mxfp4", "mxfp8"])
def test_their_reader_gives_our_weight_of_byte_scales(spec: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    layer = converted(spec, torch.bfloat16)
    scheme = linear_scheme(layer.specs)
    assert scheme.half_only
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    read = compressor.decompress(
        linear_tensors(layer, scheme, "layer"), QuantizationScheme.model_validate(scheme.group(["Linear"]))
    )
    assert torch.equal(read["weight"], layer.weight)


REFUSED = {
    "uint9:channel:asym": "at most 8 bits",
    "int4:channel@1": "axis 0",
    "int4:g128:asym:zero=float": "zero points are integers",
    "nf4:g32": "knows the floats fp8_e4m3 and fp4_e2m1, not nf4",
    "fp8_e5m2:channel": "not fp8_e5m2",
    "fp4_e2m1:g32": "as nvfp4 and as mxfp4",
    "fp8_e4m3:channel:scale=e8m0": "groups of 32",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_a_weight_without_a_word_for_it(spec: str) -> None:
    with pytest.raises(SpecError, match=REFUSED[spec]) as error:
        linear_scheme({"weight": QuantSpec.parse(spec)})
    assert str(error.value).startswith(f"weight: {QuantSpec.parse(spec)}: ")


INPUTS = {
    "int8:channel@-1": "no scale per input channel",
    "int8:g32": "no fixed ranges for groups",
    "int16:tensor": "at most 8 bits",
    "int8:token:dyn:scale=bfloat16": "does not round dynamic scales",
}


@pytest.mark.parametrize("spec", INPUTS)
def test_an_input_without_a_word_for_it(spec: str) -> None:
    with pytest.raises(SpecError, match=INPUTS[spec]):
        linear_scheme({"weight": QuantSpec.parse("int8:channel"), "input": QuantSpec.parse(spec)})


def test_an_output_and_a_lone_input_have_no_word() -> None:
    spec = QuantSpec.parse("int8:tensor")
    with pytest.raises(SpecError, match="output"):
        linear_scheme({"weight": spec, "output": spec})
    with pytest.raises(SpecError, match="whose weight is not"):
        linear_scheme({"input": spec})


CACHES = {
    ("int8:tensor", None): "both or neither",
    ("int8:tensor", "int8:tensor:asym"): "one scheme for keys and values",
    ("int8:token:dyn", "int8:token:dyn"): "one range over all tokens",
    ("int8:channel@-1", "int8:channel@-1"): "by tensor or head",
}


@pytest.mark.parametrize(("key", "value"), CACHES)
def test_a_cache_without_a_word_for_it(key: str, value: str | None) -> None:
    with pytest.raises(SpecError, match=CACHES[key, value]):
        cache_args(QuantSpec.parse(key), value and QuantSpec.parse(value))
