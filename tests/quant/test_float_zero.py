"""Float zero points: the range is spanned as it is, and zero need not be on the grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.quant.strategies import INTEGERS, matrices
from wrapq.errors import SpecError
from wrapq.quant import affine
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec

NARROW = [dtype for dtype in INTEGERS if dtype.bits <= 8]
RESOLUTION = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@st.composite
def free_specs(draw: st.DrawFn, scale_dtypes: tuple[str, ...] = ("float32",)) -> QuantSpec:
    granularity = draw(st.sampled_from(["tensor", "channel", "group", "block"]))
    return QuantSpec(
        dtype=draw(st.sampled_from(NARROW)),
        granularity=granularity,
        group_size=draw(st.sampled_from((1, 4, 8, 24))) if granularity == "group" else None,
        block_size=(4, 5) if granularity == "block" else None,
        symmetric=False,
        scale_dtype=draw(st.sampled_from(scale_dtypes)),
        zero_point="float",
    )


def chosen(x: Tensor, spec: QuantSpec) -> QParams:
    return QParams(spec, *affine.range_to_qparams(*affine.reduce_range(x, spec), spec))


def wide(values: Tensor, x: Tensor, spec: QuantSpec) -> np.ndarray:
    """Scales or zero points, one for each element of a matrix, float64."""
    if spec.granularity == "group":
        values = values.repeat_interleave(spec.group_size or 1, dim=-1)
    if spec.granularity == "block":
        rows, columns = spec.block_size
        values = values.repeat_interleave(rows, 0)[: len(x)].repeat_interleave(columns, 1)[:, : x.shape[1]]
    return values.expand(x.shape).double().numpy()


@given(matrices(), free_specs())
def test_agrees_with_the_formula_in_float64(x: Tensor, spec: QuantSpec):
    qparams = chosen(x, spec)
    low, high = (wide(bound, x, spec) for bound in affine.reduce_range(x, spec))
    qmin, qmax = spec.dtype.qmin, spec.dtype.qmax
    scale = np.maximum((high - low) / (qmax - qmin), np.maximum(np.abs(low), np.abs(high)) / affine.FARTHEST)
    scale = np.where(scale == 0, 1, scale)
    np.testing.assert_allclose(wide(qparams.scale, x, spec), scale, rtol=1e-6)
    zero = qmin - low / scale
    off = np.abs(wide(qparams.zero_point, x, spec) - zero)  # float32 rounds the scale, the quotient and the sum
    np.testing.assert_array_less(off, 3e-7 * (np.abs(low / scale) + abs(qmin) + 1))
    steps = x.double().numpy() / scale + zero
    ideal = np.clip(np.rint(steps), qmin, qmax)
    near_tie = np.abs(np.abs(steps - np.trunc(steps)) - 0.5) < 1e-6 * (np.abs(zero) + 256)
    q = qparams.quantize(x).numpy()
    assert np.all((q == ideal) | near_tie)
    values = (q - wide(qparams.zero_point, x, spec)) * wide(qparams.scale, x, spec)
    size = float(x.abs().max())
    np.testing.assert_allclose(
        qparams.dequantize(torch.from_numpy(q), torch.float32), values, rtol=1e-6, atol=size * 1e-6
    )


@given(matrices(), free_specs(("float32", "bfloat16", "float16")))
def test_fake_quantize_is_dequantize_of_quantize_and_once_is_enough(x: Tensor, spec: QuantSpec):
    qparams = chosen(x, spec)
    q, fake = qparams.quantize(x), qparams.fake_quantize(x)
    assert torch.equal(fake, qparams.dequantize(q, x.dtype))
    assert torch.equal(qparams.quantize(fake), q)
    torch.testing.assert_close(qparams.fake_quantize(fake), fake, rtol=0, atol=0)


@given(matrices(), free_specs())
def test_no_element_is_off_by_more_than_half_a_step(x: Tensor, spec: QuantSpec):
    qparams = chosen(x, spec)
    error = (qparams.fake_quantize(x).double() - x.double()).abs().numpy()
    rounding = 4 * RESOLUTION["float32"] * float(x.double().abs().max()) + 1e-37
    assert np.all(error <= 0.5 * wide(qparams.scale, x, spec) * (1 + 1e-6) + rounding)


@given(matrices(), free_specs(("bfloat16",)))
def test_a_narrow_zero_point_costs_its_own_rounding(x: Tensor, spec: QuantSpec):
    qparams = chosen(x, spec)
    scale, zero = (wide(value, x, spec) for value in (qparams.scale, qparams.zero_point))
    error = (qparams.fake_quantize(x).double() - x.double()).abs().numpy()
    levels = spec.dtype.qmax - spec.dtype.qmin
    part = RESOLUTION[spec.scale_dtype]
    assert np.all(error <= scale * (0.5 + 1.01 * part * (np.abs(zero) + levels)) * (1 + 1e-3) + 1e-37)


def test_a_range_far_from_zero_is_spanned_as_it_is():
    x = torch.linspace(2, 5, 16)[None]
    free, plain = (chosen(x, QuantSpec.parse(f"uint4:tensor:asym{part}")) for part in (":zero=float", ""))
    torch.testing.assert_close(free.fake_quantize(x), x, rtol=1e-6, atol=0)
    assert free.scale.item() == pytest.approx(3 / 15) and plain.scale.item() == pytest.approx(5 / 15)
    assert free.zero_point.item() == pytest.approx(-2 / (3 / 15))


@pytest.mark.parametrize("scale", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [0.0, 3.5, -3.5, 1e-3, -1e-6, 1e-44, 3.3e38, -3.3e38])
def test_constant_tensors(scale: str, value: float):
    x = torch.full((2, 8), value)
    qparams = chosen(x, QuantSpec.parse(f"int4:channel:asym:scale={scale}:zero=float"))
    result = qparams.fake_quantize(x)
    assert bool(torch.isfinite(result).all())
    if scale != "float16" or 1e-3 <= abs(value) < 1e5:  # the numbers of a float16 scale end there
        torch.testing.assert_close(result, x, rtol=2 * RESOLUTION[scale], atol=1e-36)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int4:g64:sym:zero=float", "for asymmetric integers: add symmetric: false"),
        ("uint8:tensor:asym:dyn:zero=float", "static specs of weights, not dynamic ones"),
        ("fp8_e4m3:channel:zero=float", "for asymmetric integers"),
        ("mxint8:zero=float", "for asymmetric integers"),
        ("int4:g64:asym:scale=fp8_e4m3:zero=float", "in float32, bfloat16, float16, not fp8_e4m3"),
        ("int4:g64:asym:zero=bfloat16", "unknown kind of zero point 'bfloat16'; one of: int, float, min"),
        ("int4:g64:asym:zero=float:zero=int", "says zero_point twice"),
    ],
)
def test_what_contradicts_itself_is_refused(text: str, said: str):
    with pytest.raises(SpecError, match=said):
        QuantSpec.parse(text)


def test_the_short_form_and_the_mapping_say_the_same():
    spec = QuantSpec.from_fields(
        {"dtype": "int4", "granularity": "group", "group_size": 64, "symmetric": False, "zero_point": "float"}
    )
    assert str(spec) == "int4:g64:asym:zero=float" and QuantSpec.parse("int4:zero=float:asym:g64") == spec
    assert QuantSpec.parse("int4:g64:asym:zero=int") == QuantSpec.parse("int4:g64:asym")
