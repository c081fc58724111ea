"""The same scales, integers and packed words as compressed-tensors, bit for bit."""

import pytest
import torch
from torch import Tensor

from wrapq.observers.base import observe_tensor
from wrapq.quant.affine import reduce_range
from wrapq.quant.packing import pack, unpack
from wrapq.quant.spec import QuantSpec

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

SYMMETRIC = ["int4:g32", "int4:g128", "int4:channel", "int8:channel", "int8:tensor", "int3:g64", "int8:g32"]


def arguments(spec: QuantSpec) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=spec.dtype.bits,
        type="int",
        symmetric=spec.symmetric,
        strategy=spec.granularity,
        group_size=spec.group_size,
    )


def theirs(w: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    return calculate_qparams(*reduce_range(w, spec), arguments(spec))


@pytest.mark.parametrize("text", SYMMETRIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_symmetric_weights(text: str, dtype: torch.dtype):
    torch.manual_seed(0)
    spec, w = QuantSpec.parse(text), (torch.randn(96, 256) * 0.02).to(dtype)
    qparams, (scale, zero_point) = observe_tensor(w, spec, "weight"), theirs(w, spec)
    assert torch.equal(qparams.scale, scale)
    q = qparams.quantize(w)
    expected = quantize(w.float(), scale, zero_point, arguments(spec), dtype=torch.int8)
    assert torch.equal(q, expected)
    assert torch.equal(qparams.dequantize(q, torch.float32), dequantize(expected, scale, zero_point, arguments(spec)))
    assert torch.equal(qparams.fake_quantize(w.float()), fake_quantize(w.float(), scale, zero_point, arguments(spec)))


@pytest.mark.parametrize("text", ["int4:g32:asym", "int8:channel:asym"])
def test_asymmetric_weights(text: str):
    torch.manual_seed(0)
    spec, w = QuantSpec.parse(text), torch.randn(96, 256) * 0.02 + 0.005
    qparams, (scale, zero_point) = observe_tensor(w, spec, "weight"), theirs(w, spec)
    assert torch.equal(qparams.scale, scale)
    assert torch.equal(qparams.zero_point.float(), zero_point.float().round())
    expected = quantize(w, scale, zero_point.round(), arguments(spec), dtype=torch.int8)
    # they add the zero point before rounding, which moves a value that lies on a tie
    assert (qparams.quantize(w) != expected).float().mean() < 1e-3


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100, 256])
def test_packed_words(bits: int, columns: int):
    dtype = QuantSpec.parse(f"int{bits}").dtype
    q = torch.randint(dtype.qmin, dtype.qmax + 1, (7, columns), dtype=torch.int8)
    packed = pack(q, dtype)
    # their row is padded with zero integers after the offset is added, hence with zero bits, as ours
    assert torch.equal(packed, pack_to_int32(q, bits))
    assert torch.equal(unpack(packed, dtype, columns), unpack_from_int32(packed, bits, q.shape))
