"""Scales that are quantized themselves, as ggml's k-quants have them: integers, times a step in half precision that the
scales of 256 neighbouring elements share (`QK_K` in llama.cpp's `ggml/src/ggml-common.h`).

The products are exact in float32, so that scales are kept as such, and taken apart when they are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wrapq.errors import SpecError
from wrapq.quant.dtypes import DType, dtype_named
from wrapq.quant.spec import QuantSpec

LEAST, MOST = 2.0**-24, 65504.0
"""The smallest and largest step, in half precision."""


def split_super(values: Tensor, spec: QuantSpec) -> Tensor:
    """What there is for each group, [..., G], as [..., S, G / S] of S super-blocks."""
    return values.unflatten(-1, (-1, spec.groups_at_once))


def rounded_step(step: Tensor) -> Tensor:
    """Float32 steps in half precision, none of them zero."""
    size = step.abs().clamp(LEAST, MOST)
    return torch.where(step < 0, -size, size).half().float()


def round_super(values: Tensor, spec: QuantSpec, least: int) -> Tensor:
    """`values` [..., G], float32, as such products: that of the largest magnitude in a super-block gives the step.

    Args:
        least: the least magnitude of an integer, 1 where a product must not be zero.
    """
    kind, parts = dtype_named(spec.scale_dtype), split_super(values, spec)
    step = rounded_step(_longest(parts) / _end(kind))
    return (step * round_codes(parts / step, kind, least)).flatten(-2).add_(0.0)  # no negative zero


def round_codes(ratio: Tensor, kind: DType, least: int) -> Tensor:
    """Integers of `kind` near to `ratio`, float32, of at least the magnitude `least`."""
    codes = ratio.round().clamp_(kind.qmin, kind.qmax)
    return torch.where(codes == 0, torch.where(ratio < 0, -least, least), codes) if least else codes


def taken_apart(values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Integers [..., G], int32, and steps [..., S], float16, whose products are `values` [..., G] to the bit, with the
    smallest steps of those that are; raises `SpecError` where there are none."""
    kind, parts = dtype_named(spec.scale_dtype), split_super(values, spec)
    longest, end = _longest(parts), _end(kind)
    codes, step = torch.zeros_like(parts), torch.ones_like(longest)
    found = longest == 0
    for size in range(abs(end), 0, -1):
        if bool(found.all()):
            break
        tried = (longest / (size if end > 0 else -size)).half().float()
        levels = (parts / tried).round_()
        fits = (levels * tried == parts) & (levels >= kind.qmin) & (levels <= kind.qmax)
        new = fits.all(-1, keepdim=True) & ~found
        codes, step, found = torch.where(new, levels, codes), torch.where(new, tried, step), found | new
    if not bool(found.all()):
        raise SpecError(f"{spec}: scales that are no integers times a number in half precision")
    return codes.flatten(-2).to(torch.int32), step.squeeze(-1).half()


def put_together(codes: Tensor, step: Tensor, spec: QuantSpec) -> Tensor:
    """The inverse of `taken_apart`, float32."""
    return (split_super(codes.float(), spec) * step.float()[..., None]).flatten(-2)


def _longest(parts: Tensor) -> Tensor:
    """The number of the largest magnitude in each super-block [..., S, 1]."""
    return parts.gather(-1, parts.abs().argmax(-1, keepdim=True))


def _end(kind: DType) -> int:
    """The integer of the largest magnitude, of which a signed grid has one more below zero."""
    return kind.qmin if kind.signed else kind.qmax
