"""GPTQ's loop over the columns of a weight, in the grids of one recipe or of several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from wrapq.algorithms.seqmse import tile
from wrapq.calibration.factor import Factor
from wrapq.quant.affine import quantize_elements, round_to_grid, round_to_levels
from wrapq.quant.dtypes import DType
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec

_NEAR = 32  # columns within a block whose errors are taken off one by one
_VECTOR = 16  # float32 numbers in the widest vector of a CPU
_STACKED = 4096  # rows that stand side by side at most: a block's errors then lie in a core's cache


class Solved(NamedTuple):
    """A weight rounded in one of the ranges: its codes [N, K], and for each row what that loses [N],
    `d (H + damping) d^T` for the error d in the columns that data reached."""

    codes: Tensor
    lost: Tensor


def stacks(weight: Tensor, tried: Sequence[Sequence[QParams]]) -> list[list[int]]:
    """Which of several specs, in whose ranges `weight` [N, K] is to be rounded, go side by side: integers whose scales
    cover the same tiles, up to a number of rows. What that saves is the time of calling torch, so that there is nothing
    to save where one launch does all columns of a block."""
    found: list[list[int]] = []
    open_stacks: dict[object, tuple[list[int], int]] = {}
    for index, ranges in enumerate(tried):
        spec, rows = ranges[0].spec, len(weight) * len(ranges)
        kind = spec.granularity, tile(weight.shape, spec)
        stack, height = open_stacks.get(kind, ([], _STACKED))
        if weight.is_cuda or spec.dtype.kind != "int":
            found.append([index])
        elif height + rows > _STACKED:
            found.append([index])
            open_stacks[kind] = found[-1], rows
        else:
            stack.append(index)
            open_stacks[kind] = stack, height + rows
    return found


def gptq(
    weight: Tensor, ranges: Sequence[QParams], factor: Factor, block_size: int = 128, first: int = 0
) -> list[Solved]:
    """`weight` [N, K] rounded in the grid of each of `ranges`, which are of one spec, or of several as `stacks` has it;
    where they are those of a larger weight, `first` is the row of that at which this one begins.

    Columns that no data reached are rounded to nearest. The work is done on the transposed weight, whose rows are the
    columns that the algorithm goes through, so that each step reads memory in order; several ranges stand side by side,
    as if the weight had so many times its rows, which are independent of each other. Its steps are written with the
    rows of U divided by its diagonal, so that errors are plain ones. What is lost comes for free: `d H d^T` is the sum
    of the squares of `(w - q) / U_ii`.

    Each spec's products are computed by themselves, and its rows begin on a boundary of a CPU's vectors, because the
    last digits may depend on both: a weight is rounded to the same codes beside others as alone.
    """
    (rows, columns), spec = weight.shape, ranges[0].spec
    order = torch.arange(columns, device=weight.device) if factor.order is None else factor.order
    grids = _Grids([r.spec for r in ranges], rows, weight.device)
    run = order // tile((rows, columns), spec)[1]  # of each column, as they come
    lines = lambda value: by_run(value, first + rows, columns, spec)[:, first:]  # noqa: E731
    scale = grids.side_by_side([lines(r.effective_scale) for r in ranges], 1)
    zero = None
    if any(r.zero_point is not None for r in ranges):
        zeros = [r.scale.new_zeros(1, 1) if r.zero_point is None else r.zero_point.float() for r in ranges]
        zero = grids.side_by_side([lines(zero_point) for zero_point in zeros], 0)
    # [K, N x ranges]: the open columns, then in their place grid points
    steps = grids.side_by_side([weight.float().t()[order]] * len(ranges), 0)
    diagonal = factor.upper.diagonal()
    upper, weights = factor.upper / diagonal[:, None], torch.where(factor.dead, 0, diagonal.square().reciprocal())
    errors, lost = steps.new_empty(min(block_size, columns), grids.lines), steps.new_zeros(grids.lines)
    launch = _in_one_launch(steps.device, spec.dtype)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        part, block = slice(start, stop), errors[: stop - start]
        points, scales = None if zero is None else zero.index_select(0, run[part]), scale.index_select(0, run[part])
        if launch is not None:
            launch(steps[part], block, scales, points, upper[part, part], spec.dtype)
        else:
            _round_columns(steps[part], block, scales, points, upper[part, part], grids)
        for mine in grids.spans:
            lost[mine] += weights[part] @ block[:, mine].square()
            if stop < columns:
                steps[stop:, mine].addmm_(upper[part, stop:].t(), block[:, mine], alpha=-1)
    solved, one = [], steps.new_ones(1)
    for its, place in zip(ranges, grids.places, strict=True):
        shift = None if zero is None else zero[:, place].index_select(0, run)
        codes = quantize_elements(steps[:, place], one, shift, its.spec.dtype)
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
        solved.append(Solved(codes.t().contiguous(), lost[place]))
    return solved


class _Grids:
    """Where the ranges of several specs stand side by side, and what is rounded to there.

    Args:
        specs: that of each range, equal ones one after the other.
        rows: of each range.

    Attributes:
        places: the lines of each range.
        dtypes: that of each spec.
        spans: the lines of each spec, up to the next boundary of a CPU's vectors.
        lines: how many there are in all.
    """

    def __init__(self, specs: Sequence[QuantSpec], rows: int, device: torch.device) -> None:
        self.places: list[slice] = []
        self.dtypes: list[DType] = []
        self.spans: list[slice] = []
        self.lines = 0
        for spec, same in groupby(specs):
            start = self.lines
            for _ in same:
                self.places.append(slice(self.lines, self.lines + rows))
                self.lines += rows
            self.lines += -self.lines % _VECTOR
            self.dtypes.append(spec.dtype)
            self.spans.append(slice(start, self.lines))
        self._ends: tuple[Tensor, Tensor] | tuple[int, int] | None = None  # of integers
        if len(self.dtypes) > 1:
            low, high = torch.empty(2, self.lines, device=device)
            for dtype, span in zip(self.dtypes, self.spans, strict=True):
                low[span], high[span] = dtype.qmin, dtype.qmax
            self._ends = low, high
        elif self.dtypes[0].kind == "int":
            self._ends = self.dtypes[0].qmin, self.dtypes[0].qmax

    def side_by_side(self, each: Sequence[Tensor], between: float) -> Tensor:
        """What each range has [R, N], in its place [R, lines]."""
        result = each[0].new_full((len(each[0]), self.lines), between, dtype=torch.float32)
        for its, place in zip(each, self.places, strict=True):
            result[:, place] = its
        return result

    def round(self, steps: Tensor, zero: Tensor | None) -> Tensor:
        """The grid points nearest to `steps`, which are overwritten."""
        if self._ends is None:
            return round_to_grid(steps, zero, self.dtypes[0])
        return round_to_levels(steps, zero, *self._ends)


def _round_columns(
    lines: Tensor, errors: Tensor, scale: Tensor, zero: Tensor | None, upper: Tensor, grids: _Grids
) -> None:
    """See `wrapq.algorithms.gpu.gptq.round_columns`; for any grid on any device."""
    # views are made once for all: a column takes microseconds
    rows, its, scales, weights = lines.unbind(), errors.unbind(), scale.unbind(), upper.t().contiguous()
    zeros = [None] * len(lines) if zero is None else zero.unbind()
    parts = [(lines[:, span], errors[:, span]) for span in grids.spans]
    apart = [(mine, done.t(), mine.unbind(), done.unbind()) for mine, done in parts]
    for start in range(0, len(lines), _NEAR):  # what lies further back is taken off many columns at once
        stop = min(start + _NEAR, len(lines))
        if start:
            for mine, done, _, _ in apart:
                mine[start:stop].addmm_(weights[start:stop, :start], done[:, :start].t(), alpha=-1)
        for i in range(start, stop):
            for _, done, line, into in apart:
                torch.addmv(line[i], done[:, start:i], weights[i, start:i], alpha=-1, out=into[i])
            steps = torch.div(its[i], scales[i], out=rows[i])
            chosen = grids.round(steps, zeros[i])
            if chosen is not steps:
                steps.copy_(chosen)
            its[i].addcmul_(steps, scales[i], value=-1)


_RoundColumns = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, DType], None]


def _in_one_launch(device: torch.device, dtype: DType) -> _RoundColumns | None:
    """The loop over a block's columns as one kernel, where there is one."""
    if device.type != "cuda" or dtype.kind != "int":
        return None
    try:
        from wrapq.algorithms.gpu.gptq import round_columns
    except ImportError:  # torch brings Triton, except on Windows
        return None
    return round_columns


def by_run(value: Tensor, rows: int, columns: int, spec: QuantSpec) -> Tensor:
    """A scale or zero point for the first `rows` of a weight, for each run of columns that share it [R, N]."""
    tall, wide = tile((rows, columns), spec)
    by_row = value.reshape(-1, value.shape[-1])
    by_row = by_row.repeat_interleave(tall, 0) if spec.granularity == "block" else by_row
    return (by_row if len(by_row) == 1 else by_row[:rows]).expand(rows, -(-columns // wide)).t()


def spread(value: Tensor, rows: int, columns: int, spec: QuantSpec) -> Tensor:
    """A scale or zero point of a weight [N, K], for each of its elements."""
    if spec.granularity == "group":
        value = value.repeat_interleave(spec.group_size or 1, dim=-1)
    elif spec.granularity == "block":
        tall, wide = spec.block_size or (1, 1)
        value = value.repeat_interleave(tall, dim=0)[:rows].repeat_interleave(wide, dim=1)[:, :columns]
    return value.expand(rows, columns)
