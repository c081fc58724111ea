"""GPTQ's loop over the columns of a block in one launch, where plain tensor operations take eight for each column."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from wrapq.quant.dtypes import DType

_OUTPUTS, _WARPS = 16, 1
_ROUND = tl.constexpr(1.5 * 2**23)
"""Added and taken away, it rounds a float32 below 2^22 to the nearest integer, ties to even."""
_BOUND = tl.constexpr(2.0**21)


def round_columns(
    lines: Tensor, errors: Tensor, scale: Tensor, zero: Tensor | None, upper: Tensor, dtype: DType
) -> None:
    """Round B columns of a weight one after the other, each column's error taken from those after it.

    Args:
        lines: float32 [B, N], the columns; grid points (in steps, without the zero point) afterwards.
        errors: float32 [B, N], where `w - q` is written.
        scale: float32 [B, N].
        zero: float32 [B, N], or None.
        upper: float32 [B, B], `U_ij / U_ii` for the block on the diagonal of the upper Cholesky factor U of the inverse
            Hessian.
        dtype: an integer grid.
    """
    size, width = lines.shape
    _round_columns[(triton.cdiv(width, _OUTPUTS),)](
        lines,
        errors,
        scale,
        scale if zero is None else zero,
        upper.contiguous(),  # a factor that was flipped is not
        width,
        float(dtype.qmin),
        float(dtype.qmax),
        size=size,
        shifted=zero is not None,
        padded=triton.next_power_of_2(size),
        count=_OUTPUTS,
        num_warps=_WARPS,
    )


@triton.jit
def _round_columns(
    lines: tl.tensor,
    errors: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    upper: tl.tensor,
    width: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    size: tl.constexpr,
    shifted: tl.constexpr,
    padded: tl.constexpr,
    count: tl.constexpr,
) -> None:
    """Each program keeps its outputs' columns in registers from the first to the last."""
    outputs = tl.program_id(0) * count + tl.arange(0, count)
    columns, real = tl.arange(0, padded), outputs < width
    held = (columns[:, None] < size) & real[None, :]
    left = tl.load(lines + columns[:, None] * width + outputs[None, :], mask=held, other=0.0)
    for i in range(size):
        column = tl.sum(tl.where(columns[:, None] == i, left, 0.0), 0)
        scale = tl.load(scales + i * width + outputs, mask=real, other=1.0)
        steps = tl.minimum(tl.maximum(tl.div_rn(column, scale), -_BOUND), _BOUND)
        zero = tl.load(zeros + i * width + outputs, mask=real, other=0.0) if shifted else 0.0
        point = tl.minimum(tl.maximum((steps + zero) + _ROUND - _ROUND, low), high) - zero
        error = column - point * scale
        tl.store(lines + i * width + outputs, point, mask=real)
        tl.store(errors + i * width + outputs, error, mask=real)
        weights = tl.load(upper + i * size + columns, mask=(columns > i) & (columns < size), other=0.0)
        left -= weights[:, None] * error[None, :]
