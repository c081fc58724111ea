"""Scales and zero points rounded to the numbers that specs store; all float32, or int32 on the grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wrapq.quant import casts
from wrapq.quant.dtypes import DTYPES, DType
from wrapq.quant.spec import QuantSpec
from wrapq.quant.super_blocks import round_super

TINY = torch.finfo(torch.float32).tiny
E4M3_MAX, E4M3_LEAST = DTYPES["fp8_e4m3"].largest, 2.0**-9


def round_zero_point(zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Float32 zero points as the spec has them: int32 on the grid, or float32 numbers of `zero_point_dtype`."""
    if spec.zero_point == "int":
        return zero_point.round().clamp_(spec.dtype.qmin, spec.dtype.qmax).to(torch.int32)
    kind = getattr(torch, spec.scale_dtype)
    return zero_point.clamp(torch.finfo(kind).min, torch.finfo(kind).max).to(kind).float()


def round_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Positive float32 scales, or those of super-blocks of any sign, rounded to the number of the spec's `scale_dtype`
    nearest to each, still float32."""
    if spec.scale_dtype == "fp8_e4m3":
        return casts.round_to_format(scale.clamp(E4M3_LEAST, E4M3_MAX), DTYPES["fp8_e4m3"])
    if spec.super_blocks:
        return round_super(scale, spec, least=1)
    if spec.scale_dtype in ("bfloat16", "float16"):
        kind = getattr(torch, spec.scale_dtype)
        least = 2.0**-24 if kind == torch.float16 else TINY
        return scale.clamp(least, torch.finfo(kind).max).to(kind).float()
    return scale


def round_minimum(minimum: Tensor, spec: QuantSpec) -> Tensor:
    """Float32 numbers as the spec stores them in place of zero points; unsigned ones are zero where they would be
    less."""
    if spec.super_blocks:
        return round_super(minimum if spec.scale_dtype == "int8" else minimum.clamp(min=0), spec, least=0)
    kind = getattr(torch, spec.scale_dtype)
    return minimum.clamp(torch.finfo(kind).min, torch.finfo(kind).max).to(kind).float()


def zero_in_steps(scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor | None:
    """The zero point that codes are counted from: in steps of the scale, also where a minimum stands in its place."""
    return zero_point if zero_point is None or spec.zero_point != "min" else zero_point / scale


def power_of_two_scale(bound: Tensor, dtype: DType) -> Tensor:
    """The e8m0 scale of a symmetric range of `bound`, by the rule that `wrapq.quant.affine.range_to_qparams` tells."""
    largest, largest_exponent = math.frexp(dtype.half_range)
    largest_exponent -= 1
    mantissa, exponent = torch.frexp(bound)  # mantissas from 0.5 to 1
    exponent = exponent - 1 - largest_exponent + (mantissa >= max(0.875, largest))
    # 2**-127, the least e8m0, is no normal float32; dequantized numbers stay below 2**128
    exponent = exponent.clamp_(-126, 126 - largest_exponent)
    return torch.where(bound == 0, 1.0, torch.ldexp(torch.ones_like(bound), exponent))


def usable_scale(scale: Tensor, width: Tensor, largest: float, spec: QuantSpec) -> Tensor:
    """`scale` from the least normal float32 to `largest`; 1 for a range of zero `width`, and 0 in super-blocks."""
    return torch.where(width == 0, 0.0 if spec.super_blocks else 1.0, scale.clamp(TINY, largest))
