"""Float and codebook grids: every number, every border between two, and what lies beyond."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wrapq.errors import SpecError
from wrapq.quant.casts import decode, encode, encode_nearest, round_to_format
from wrapq.quant.dtypes import DTYPES, NF4_VALUES, DType

FLOATS = [dtype for dtype in DTYPES.values() if dtype.kind == "float"]
TORCH = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
names = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def critical(dtype: DType) -> Tensor:
    """Every number of the format, every midpoint, the float32 neighbours of both, both signs, and beyond the ends."""
    values = sorted(v for v in dtype.values()[: 1 << (dtype.bits - 1)] if math.isfinite(v))
    middles = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    x = torch.tensor([*values, *middles, 1.01 * dtype.largest, 1e30, 3e38, math.inf, 1e-30, 1e-42])
    x = torch.cat([x, x.nextafter(torch.tensor(math.inf)), x.nextafter(torch.tensor(-math.inf))])
    return torch.cat([x, -x])


def nearest_by_search(x: float, dtype: DType) -> float:
    """To nearest, ties to the even code, in Python's exact arithmetic."""
    values = [v for v in dtype.values()[: 1 << (dtype.bits - 1)] if math.isfinite(v)]
    size = min(abs(x), dtype.largest)
    code = min(range(len(values)), key=lambda c: (abs(values[c] - size), c % 2))
    return math.copysign(values[code], x)


@names
def test_every_number_and_every_border_is_rounded_to_nearest_even(dtype: DType):
    x = critical(dtype)
    expected = torch.tensor([nearest_by_search(v, dtype) for v in x.tolist()])
    assert torch.equal(bits(round_to_format(x.clone(), dtype)), bits(expected))


@names
def test_codes_and_numbers_are_each_others_inverse(dtype: DType):
    codes = torch.arange(1 << dtype.bits).to(torch.uint8)
    values = decode(codes, dtype)
    finite = values.isfinite()
    assert torch.equal(encode(values[finite], dtype), codes[finite])
    assert torch.equal(bits(values[finite]), bits(round_to_format(values[finite].clone(), dtype)))
    assert int((~finite).sum()) == {"fp8_e4m3": 2, "fp8_e5m2": 8}.get(dtype.name, 0)


@pytest.mark.parametrize("name", TORCH)
def test_fp8_is_torchs_cast_with_saturation(name: str):
    dtype, kind = DTYPES[name], TORCH[name]
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    for x in (critical(dtype), every[every.isfinite()], torch.randn(100_000) * 10):
        expected = x.clamp(-dtype.largest, dtype.largest).to(kind)
        assert torch.equal(encode_nearest(x.clone(), dtype), expected.view(torch.uint8))
        assert torch.equal(bits(round_to_format(x.clone(), dtype)), bits(expected.float()))
    codes = torch.arange(256).to(torch.uint8)
    ours, theirs = decode(codes, dtype), codes.view(kind).float()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(bits(ours[~ours.isnan()]), bits(theirs[~theirs.isnan()]))


def test_fp4_is_compressed_tensors_cast():
    fp4_utils = pytest.importorskip("compressed_tensors.quantization.utils.fp4_utils")
    dtype = DTYPES["fp4_e2m1"]
    for x in (critical(dtype), torch.randn(100_000) * 3):
        x = x[x.isfinite() & (x != 0)]  # their sign of zero is that of torch.sign
        assert torch.equal(bits(round_to_format(x.clone(), dtype)), bits(fp4_utils.cast_to_fp4(x.clone())))


@pytest.mark.parametrize("name", ["fp6_e2m3", "fp6_e3m2", "fp4_e2m1"])
def test_small_floats_are_torchaos_cast(name: str):
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    dtype = DTYPES[name]
    theirs, back = {
        "fp4_e2m1": (kernels.f32_to_f4_unpacked, kernels.f4_unpacked_to_f32),
        "fp6_e2m3": (kernels.f32_to_f6_e2m3_unpacked, kernels.f6_e2m3_unpacked_to_f32),
        "fp6_e3m2": (kernels.f32_to_f6_e3m2_unpacked, kernels.f6_e3m2_unpacked_to_f32),
    }[name]
    for x in (critical(dtype), torch.randn(100_000) * 3):
        assert torch.equal(encode_nearest(x.clone(), dtype), theirs(x))
    codes = torch.arange(1 << dtype.bits).to(torch.uint8)
    assert torch.equal(bits(decode(codes, dtype)), bits(back(codes)))


@names
def test_signs_of_zero_nan_and_infinity(dtype: DType):
    tiny = 2.0 ** (dtype.least_exponent - dtype.mantissa - 2)
    x = torch.tensor([0.0, -0.0, tiny, -tiny, math.inf, -math.inf, math.nan])
    y = round_to_format(x.clone(), dtype)
    assert y[:4].signbit().tolist() == [False, True, False, True] and not y[:4].any()
    assert y[4:6].tolist() == [dtype.largest, -dtype.largest] and bool(y[6].isnan())


@names
@given(seed=st.integers(0, 2**31), exponent=st.integers(-20, 20))
def test_rounding_is_monotone_odd_and_within_half_a_step(dtype: DType, seed: int, exponent: int):
    x = (torch.randn(500, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent).sort().values
    y = round_to_format(x.clone(), dtype)
    assert bool((y.diff() >= 0).all())
    assert torch.equal(bits(round_to_format(-x, dtype)), bits(-y))
    assert torch.equal(bits(round_to_format(y.clone(), dtype)), bits(y))
    inside = x.abs() <= dtype.largest
    size = torch.frexp(x.abs().clamp(min=2.0**dtype.least_exponent)).exponent - 1 - dtype.mantissa
    assert bool(((x - y).abs()[inside] <= torch.ldexp(torch.full_like(x, 0.5), size)[inside]).all())


def test_nf4_takes_the_nearest_entry_and_the_lower_of_two():
    dtype, table = DTYPES["nf4"], torch.tensor(NF4_VALUES, dtype=torch.float64)
    borders = ((table[1:] + table[:-1]) / 2).float()
    x = torch.cat([borders, borders.nextafter(torch.tensor(2.0)), borders.nextafter(torch.tensor(-2.0))])
    x = torch.cat([x, table.float(), torch.randn(10_000), torch.linspace(-1, 1, 4097), torch.tensor([9.0, -math.inf])])
    codes = encode_nearest(x.clone(), dtype)
    assert torch.equal(codes.long(), torch.searchsorted(borders, x))
    assert torch.equal(round_to_format(x.clone(), dtype), table.float()[codes.long()])
    assert bool(round_to_format(torch.tensor([math.nan]), dtype).isnan())
    # the borders that bitsandbytes' kernel dQuantizeNF4 compares with
    assert borders[7].item() == pytest.approx(0.03979014977812767) and borders[-1].item() == pytest.approx(0.8614784)


@pytest.mark.parametrize("name", ["fp8_e4m3", "nf4"])
def test_a_float_has_no_integer_grid(name: str):
    with pytest.raises(SpecError, match="is no integer grid"):
        _ = DTYPES[name].qmax
