"""Rounding to floating-point and codebook grids, and the codes of their points.

Rounding is to nearest with ties to even mantissas, subnormals included, as IEEE 754 does it. What is larger than the
largest finite number becomes that number, infinity too (the OCP specifications call this saturating). The sign of a
zero is kept, of a rounded one as well; nf4, which has one zero and is no IEEE format, sends a tie to the lower entry,
as bitsandbytes does. NaN stays NaN while rounding; formats that have no code for it give it any.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wrapq.quant.dtypes import DTYPES, NF4_VALUES, DType

_EXPONENT_MASK = 0x7F800000
_FLOAT32_MANTISSA = 23
TORCH_FLOATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""The formats that torch has a dtype for, whose bits are the codes."""
_CHUNK = 1 << 16
"""Elements that a CPU rounds at once, so that what it needs in between stays in a core's cache."""
_NF4_CELLS = 32
"""Cells of width 1/16 over [-1, 1], so narrow that none holds two of the midpoints between entries of nf4."""


def round_to_format(x: Tensor, dtype: DType) -> Tensor:
    """Each element of the float32 `x`, which is overwritten, as the nearest number of the float or codebook `dtype`."""
    x = x.contiguous()
    flat = x.view(-1)
    for part in flat.split(_CHUNK if x.device.type == "cpu" else max(1, flat.numel())):
        part.copy_(_rounded(part.clamp_(-dtype.largest, dtype.largest), dtype))
    return x


def _rounded(x: Tensor, dtype: DType) -> Tensor:
    if dtype.kind == "codebook":
        return decode(encode_nearest(x, dtype), dtype).add_(x.mul_(0))  # nothing but NaN is changed by that
    if dtype.name == "fp8_e5m2":
        return x.to(torch.float8_e5m2)
    # Adding 1.5 * 2**23 steps of the size that x has in the format leaves no bit below a step: the sum is rounded as
    # float32 rounds, to nearest even. The power of two below |x| gives that size, down to that of the subnormals.
    shift = x.view(torch.int32).bitwise_and(_EXPONENT_MASK).view(torch.float32)
    shift.clamp_(min=2.0**dtype.least_exponent).mul_(1.5 * 2 ** (_FLOAT32_MANTISSA - dtype.mantissa))
    return (x + shift).sub_(shift).copysign_(x)


def encode_nearest(x: Tensor, dtype: DType) -> Tensor:
    """The codes, uint8, of the numbers of `dtype` nearest to the float32 `x`, which may be overwritten."""
    if dtype.kind == "float":
        return encode(round_to_format(x, dtype), dtype)
    first, midpoint = (table.to(x.device) for table in _NF4_TABLES)
    cell = (x + 1).mul_(_NF4_CELLS / 2).clamp_(0, _NF4_CELLS - 1).to(torch.int32).clamp_(0, _NF4_CELLS - 1).flatten()
    above = x.flatten() > midpoint.index_select(0, cell)
    return (first.index_select(0, cell) + above).reshape(x.shape)


def encode(values: Tensor, dtype: DType) -> Tensor:
    """The codes, uint8, of float32 `values` that are numbers of the float `dtype`."""
    if dtype.name in TORCH_FLOATS:
        return values.to(TORCH_FLOATS[dtype.name]).view(torch.uint8)
    # all numbers of the narrower formats are numbers of fp8_e4m3 too, whose bits torch gives
    wide = values.to(torch.float8_e4m3fn).view(torch.uint8)
    table = _NARROWED[dtype.name].to(values.device)
    return table.index_select(0, wide.to(torch.int32).flatten()).reshape(values.shape)


def decode(codes: Tensor, dtype: DType) -> Tensor:
    """The numbers, float32, that codes of a float or codebook `dtype` stand for."""
    table = _TABLES[dtype.name].to(codes.device)
    return table.index_select(0, codes.to(torch.int32).flatten()).reshape(codes.shape)


def _narrowed(dtype: DType) -> Tensor:
    """For each code of fp8_e4m3 the code of the same number in `dtype`, 0 where there is none."""
    table = torch.zeros(256, dtype=torch.uint8)
    wide = torch.tensor(dtype.values()).to(torch.float8_e4m3fn).view(torch.uint8)
    table[wide.long()] = torch.arange(1 << dtype.bits).to(torch.uint8)
    return table


def _nf4_cells() -> tuple[Tensor, Tensor]:
    """For each cell the entry at its left end, and the midpoint in it or infinity."""
    values = torch.tensor(NF4_VALUES, dtype=torch.float64)
    midpoints = ((values[1:] + values[:-1]) / 2).float()
    left = torch.arange(_NF4_CELLS) * (2 / _NF4_CELLS) - 1
    first = torch.searchsorted(midpoints, left)
    following = torch.cat([midpoints, torch.tensor([torch.inf])])[first]
    return first.to(torch.uint8), torch.where(following <= left + 2 / _NF4_CELLS, following, torch.inf)


_NF4_TABLES = _nf4_cells()
_TABLES = {name: torch.tensor(dtype.values()) for name, dtype in DTYPES.items() if dtype.kind != "int"}
_NARROWED = {name: _narrowed(DTYPES[name]) for name in ("fp6_e2m3", "fp6_e3m2", "fp4_e2m1")}
