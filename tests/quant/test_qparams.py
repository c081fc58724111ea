import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wrapq.errors import ModelError, SpecError
from wrapq.observers.base import observe_tensor
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec

TEXTS = ["int8:tensor", "int8:channel", "uint4:g8:asym", "uint16:tensor", "int4:g8", "int4:g8:asym:zero=float"]
TEXTS += ["uint3:channel:asym:scale=bfloat16:zero=float", "uint8:tensor:asym:scale=float16:zero=float"]


def ordered(x: Tensor, permutation: Tensor, text: str = "uint4:g8:asym") -> tuple[QParams, Tensor]:
    """Parameters whose groups follow `permutation`, and the columns of `x` in the order of their slots."""
    slots = torch.empty_like(x)
    slots[:, permutation] = x
    qparams = observe_tensor(slots, QuantSpec.parse(text), "weight")
    return QParams(qparams.spec, qparams.scale, qparams.zero_point, permutation), slots


@pytest.mark.parametrize("text", TEXTS)
def test_survives_a_checkpoint(text: str, tmp_path):
    qparams = observe_tensor(torch.randn(6, 24), QuantSpec.parse(text), "weight")
    save_file(qparams.tensors("weight"), tmp_path / "q.safetensors")
    back = QParams.from_tensors("weight", load_file(tmp_path / "q.safetensors"), qparams.spec)
    assert back.digest() == qparams.digest()
    assert set(qparams.tensors("weight")) <= {"weight_scale", "weight_zero_point"}


@pytest.mark.parametrize("text", [*TEXTS, "int8:channel@1", "int8:b4x8", "fp8_e4m3:channel", "int4:g8:signed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_whole_to_the_bit(text: str, dtype: torch.dtype):
    x, rows = torch.randn(11, 24), torch.tensor([10, 3, 3, 0, 9])
    qparams = observe_tensor(x, QuantSpec.parse(text), "weight")
    codes = qparams.quantize(x)
    some = qparams.of_rows(rows).dequantize(codes[rows], dtype)
    assert torch.equal(some, qparams.dequantize(codes, dtype)[rows])


def test_rows_keep_an_activation_order_and_a_global_scale():
    x, rows = torch.randn(6, 32), torch.tensor([5, 0, 0])
    qparams, _ = ordered(x, torch.randperm(32))
    codes = qparams.quantize(x)
    assert torch.equal(qparams.of_rows(rows).dequantize(codes[rows], x.dtype), qparams.dequantize(codes, x.dtype)[rows])
    nvfp4 = observe_tensor(x, QuantSpec.parse("fp4_e2m1:g16:scale=fp8_e4m3:global"), "weight")
    codes = nvfp4.quantize(x)
    assert torch.equal(nvfp4.of_rows(rows).dequantize(codes[rows], x.dtype), nvfp4.dequantize(codes, x.dtype)[rows])


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("uint8:g8:asym", torch.uint8),
        ("int4:g8:asym", torch.int8),
        ("int4:g8:asym:scale=bfloat16:zero=float", torch.bfloat16),
        ("int4:g8:asym:scale=float16:zero=float", torch.float16),
    ],
)
def test_a_zero_point_is_stored_as_a_code_or_as_the_scale(text: str, dtype: torch.dtype):
    qparams = observe_tensor(torch.randn(6, 24) + 3, QuantSpec.parse(text), "weight")
    tensors = qparams.tensors("weight")
    assert tensors["weight_zero_point"].dtype == dtype
    wide = tensors | {"weight_zero_point": qparams.zero_point}
    with pytest.raises(ModelError, match=rf"weight_zero_point is {qparams.zero_point.dtype}, not {dtype}"):
        QParams.from_tensors("weight", wide, qparams.spec)
    with pytest.raises(ModelError, match="no weight_zero_point"):
        QParams.from_tensors("weight", {"weight_scale": tensors["weight_scale"]}, qparams.spec)


@pytest.mark.parametrize("text", ["uint4:g8:asym", "int4:g8", "int4:g8:asym:zero=float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_order_is_quantization_in_the_order_of_the_slots(text: str, dtype: torch.dtype):
    x, permutation = torch.randn(6, 24), torch.randperm(24)
    qparams, slots = ordered(x, permutation, text)
    plain = QParams(qparams.spec, qparams.scale, qparams.zero_point)
    q = qparams.quantize(x.to(dtype))
    assert torch.equal(q, plain.quantize(slots.to(dtype))[:, permutation])
    assert torch.equal(qparams.fake_quantize(x.to(dtype)), qparams.dequantize(q, dtype))
    assert torch.equal(qparams.fake_quantize(x.to(dtype)), plain.fake_quantize(slots.to(dtype))[:, permutation])


def test_the_digest_depends_on_every_part():
    x, permutation = torch.randn(6, 24), torch.randperm(24)
    qparams, _ = ordered(x, permutation)
    scale, zero_point = qparams.scale, qparams.zero_point
    others = [
        QParams(QuantSpec.parse("uint8:g8:asym"), scale, zero_point, permutation),
        QParams(qparams.spec, torch.nextafter(scale, scale + 1), zero_point, permutation),
        QParams(qparams.spec, scale, zero_point + 1, permutation),
        QParams(qparams.spec, scale, zero_point, permutation.flip(0)),
        QParams(qparams.spec, scale, zero_point),
        QParams(qparams.spec, scale.reshape(-1, 1), zero_point, permutation),
    ]
    assert len({qparams.digest(), *(other.digest() for other in others)}) == 7
    assert qparams.to("cpu").digest() == qparams.digest()


def test_what_is_missing_or_of_another_type_is_refused_by_name():
    spec = QuantSpec.parse("int8:tensor")
    with pytest.raises(ModelError, match="no weight_scale"):
        QParams.from_tensors("weight", {"input_scale": torch.ones(1)}, spec)
    with pytest.raises(ModelError, match=r"weight_scale is torch\.float64"):
        QParams.from_tensors("weight", {"weight_scale": torch.ones(1, dtype=torch.float64)}, spec)


def test_an_activation_order_without_groups_or_of_another_width_is_refused():
    with pytest.raises(SpecError, match="activation order"):
        QParams(QuantSpec.parse("int8:channel"), torch.ones(4, 1), permutation=torch.arange(8))
    qparams, _ = ordered(torch.randn(6, 24), torch.randperm(24))
    with pytest.raises(SpecError, match="another width than 16"):
        qparams.quantize(torch.randn(6, 16))
