"""GPTQ's loop over the columns of a weight, in several ranges side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wrapq.algorithms.seqmse import tile
from wrapq.quant.affine import quantize_elements, round_to_grid, round_to_levels
from wrapq.quant.dtypes import DType
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.cholesky import Factor

_NEAR = 32  # columns within a block whose errors are taken off one by one
_VECTOR = 16  # float32 numbers in the widest vector of a CPU


class Solved(NamedTuple):
    """A weight rounded in one of the ranges: its codes [N, K], and for each row what that loses [N],
    `d (H + damping) d^T` for the error d in the columns that data reached."""

    codes: Tensor
    lost: Tensor


def gptq(
    weight: Tensor, ranges: Sequence[QParams], factor: Factor, block_size: int = 128, first: int = 0
) -> list[Solved]:
    """`weight` [N, K] rounded in the grid of each of `ranges`, which are of one spec; where they are those of a larger
    weight, `first` is the row of that at which this one begins.

    Columns that no data reached are rounded to nearest. The work is done on the transposed weight, whose rows are the
    columns that the algorithm goes through, so that each step reads memory in order; several ranges stand side by side,
    as if the weight had so many times its rows, which are independent of each other. Its steps are written with the
    rows of U divided by its diagonal, so that errors are plain ones. What is lost comes for free: `d H d^T` is the sum
    of the squares of `(w - q) / U_ii`.

    The rows are filled up to a boundary of a CPU's vectors, as the last digits may depend on where one ends.
    """
    (rows, columns), spec = weight.shape, ranges[0].spec
    order = torch.arange(columns, device=weight.device) if factor.order is None else factor.order
    run = order // tile((rows, columns), spec)[1]  # of each column, as they come
    lines = lambda value: by_run(value, first + rows, columns, spec)[:, first:]  # noqa: E731
    scale = _side_by_side([lines(r.effective_scale) for r in ranges], 1)
    zeros = [lines(zero.float()) for r in ranges if (zero := r.zero_in_steps) is not None]
    zero = _side_by_side(zeros, 0) if zeros else None
    # [K, N x ranges]: the open columns, then in their place grid points
    steps = _side_by_side([weight.float().t()[order]] * len(ranges), 0)
    diagonal = factor.upper.diagonal()
    upper, weights = factor.upper / diagonal[:, None], torch.where(factor.dead, 0, diagonal.square().reciprocal())
    errors, lost = steps.new_empty(min(block_size, columns), steps.shape[1]), steps.new_zeros(steps.shape[1])
    round_columns = _in_one_launch(steps.device, spec.dtype) or _round_columns
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        part, block = slice(start, stop), errors[: stop - start]
        points, scales = None if zero is None else zero.index_select(0, run[part]), scale.index_select(0, run[part])
        round_columns(steps[part], block, scales, points, upper[part, part], spec.dtype)
        lost += weights[part] @ block.square()
        if stop < columns:
            steps[stop:].addmm_(upper[part, stop:].t(), block, alpha=-1)
    solved, one = [], steps.new_ones(1)
    for start in range(0, len(ranges) * rows, rows):
        place = slice(start, start + rows)
        shift = None if zero is None else zero[:, place].index_select(0, run)
        codes = quantize_elements(steps[:, place], one, shift, spec.dtype)
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
        solved.append(Solved(codes.t().contiguous(), lost[place]))
    return solved


def _side_by_side(each: Sequence[Tensor], between: float) -> Tensor:
    """What each range has [R, N], one after the other, and `between` up to a boundary of a CPU's vectors."""
    missing = -sum(part.shape[1] for part in each) % _VECTOR
    return torch.cat([*each, each[0].new_full((len(each[0]), missing), between)], 1)


def _round_columns(
    lines: Tensor, errors: Tensor, scale: Tensor, zero: Tensor | None, upper: Tensor, dtype: DType
) -> None:
    """`wrapq.algorithms.gpu.gptq_kernel.round_columns` for any grid on any device."""
    # views are made once for all: a column takes microseconds
    rows, missed, scales, weights = lines.unbind(), errors.unbind(), scale.unbind(), upper.t().contiguous()
    zeros = [None] * len(lines) if zero is None else zero.unbind()
    done, ends = errors.t(), (dtype.qmin, dtype.qmax) if dtype.kind == "int" else None
    for start in range(0, len(lines), _NEAR):  # what lies further back is taken off many columns at once
        stop = min(start + _NEAR, len(lines))
        if start:
            lines[start:stop].addmm_(weights[start:stop, :start], errors[:start], alpha=-1)
        for i in range(start, stop):
            torch.addmv(rows[i], done[:, start:i], weights[i, start:i], alpha=-1, out=missed[i])
            steps = torch.div(missed[i], scales[i], out=rows[i])
            if ends is not None:
                round_to_levels(steps, zeros[i], *ends)
            elif (chosen := round_to_grid(steps, zeros[i], dtype)) is not steps:
                steps.copy_(chosen)
            missed[i].addcmul_(steps, scales[i], value=-1)


def _in_one_launch(device: torch.device, dtype: DType) -> Callable[..., None] | None:
    """The loop over a block's columns as one kernel, where there is one."""
    if device.type != "cuda" or dtype.kind != "int":
        return None
    try:
        from wrapq.algorithms.gpu.gptq_kernel import round_columns
    except ImportError:  # torch brings Triton, except on Windows
        return None
    return round_columns


def by_run(value: Tensor, rows: int, columns: int, spec: QuantSpec) -> Tensor:
    """A scale or zero point for the first `rows` of a weight, for each run of columns that share it [R, N]."""
    tall, wide = tile((rows, columns), spec)
    by_row = value.reshape(-1, value.shape[-1])
    by_row = by_row.repeat_interleave(tall, 0) if spec.granularity == "block" else by_row
    return (by_row if len(by_row) == 1 else by_row[:rows]).expand(rows, -(-columns // wide)).t()


def spread(value: Tensor, shape: Sequence[int], spec: QuantSpec) -> Tensor:
    """A scale or zero point of a weight of `shape` [N, K], for each of its elements."""
    if spec.granularity in ("group", "block"):
        tall, wide = tile(shape, spec)
        value = value.repeat_interleave(tall, 0)[: shape[0]] if tall > 1 else value
        value = value.repeat_interleave(wide, -1)[:, : shape[1]]
    return value.expand(*shape)
