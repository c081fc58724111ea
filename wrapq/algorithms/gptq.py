"""GPTQ: rounding column by column, each column's error made good by those still open.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323,
algorithm 1. With `H = X^T X` and `H^-1 = U^T U`, column i is rounded, and `(w_i - q_i) / U_ii * U_i,j` is taken from
every column j > i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import pad

from wrapq.algorithms.seqmse import best_ranges, output_error, search_ranges, tile, unread_observer, weight_error
from wrapq.calibration.algorithm import ALGORITHMS, Rounded, Rounder
from wrapq.calibration.factor import Factor
from wrapq.calibration.statistics import InputStatistics
from wrapq.observers.base import observe_tensor
from wrapq.quant.affine import quantize_elements, round_to_grid, storage_dtype
from wrapq.quant.dtypes import DType
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import DEFAULT_OBSERVER, QuantSpec

_NEAR = 32  # columns within a block whose errors are taken off one by one
CANDIDATES, SMALLEST = 5, 0.8
"""The ranges that are tried: clipping more suits rounding to nearest, while here the open columns bear the error."""


class GPTQOptions(BaseModel):
    """Options of GPTQ."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    damp: float = Field(0.01, gt=0, description="Added to the Hessian's diagonal, relative to its mean.")
    act_order: bool = Field(True, description="Round the columns with the largest inputs first.")
    ranges: Literal["best", "observer", "hessian"] = Field(
        "best",
        description="Ranges by the spec's observer, by their error in the layer's output as seqmse does, or of several "
        "ranges for each row the best, by what GPTQ itself loses in them.",
    )
    asymmetric: float = Field(
        0.0,
        ge=0,
        le=1,
        description="How much of the error in the layer's input the weights make up for, as GPTAQ does.",
    )
    precision: Literal["float32", "float64"] = Field("float32", description="What the Hessian is summed in.")
    block_size: int = Field(128, ge=1, description="Columns between two updates of all that are still open.")


@ALGORITHMS.register("gptq")
class GPTQ(Rounder):
    """GPTQ with ranges fixed beforehand (static groups), so that any column order keeps its groups."""

    Options = GPTQOptions
    options: GPTQOptions
    combines = MappingProxyType({"damp": max})

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Algorithm.needs`."""
        more = (("cross", self.options.asymmetric), ("float64", self.options.precision == "float64"))
        return ("hessian", *(need for need, wanted in more if wanted))

    def unsupported(self, spec: QuantSpec) -> str | None:
        """See `Rounder.unsupported`."""
        return unread_observer(spec) if self.options.ranges == "hessian" else None

    def round(self, weight: Tensor, spec: QuantSpec, where: str, statistics: InputStatistics | None = None) -> Rounded:
        """See `Rounder.round`."""
        statistics, weight = statistics or InputStatistics(), weight.float()
        factor = statistics.factor(self.options.damp, self.options.act_order, where)
        if self.options.asymmetric and "cross" in statistics.sums:
            weight = weight + self.options.asymmetric * input_correction(
                weight, statistics.sums["cross"].float(), factor
            )
        hessian = statistics.get("hessian", where).float()
        ranges = self._ranges(weight, spec, hessian, where)
        codes, qparams = best_of_each_row(gptq(weight, ranges, factor, self.options.block_size), ranges)
        return Rounded(codes, qparams, {"damp": factor.damp, "dead_columns": float(factor.dead.sum())})

    def _ranges(self, weight: Tensor, spec: QuantSpec, hessian: Tensor, where: str) -> list[QParams]:
        if self.options.ranges == "hessian":
            return [search_ranges(weight, spec, hessian, where)]
        if self.options.ranges == "observer":
            return [observe_tensor(weight, spec, where)]
        observed = [] if spec.observer == DEFAULT_OBSERVER else [observe_tensor(weight, spec, where)]
        measures = [output_error(hessian, spec), weight_error]
        return [*observed, *best_ranges(weight, spec, where, measures, CANDIDATES, SMALLEST)]


class Solved(NamedTuple):
    """A weight rounded in one of the ranges: its codes [N, K], and for each row what that loses [N],
    `d (H + damping) d^T` for the error d in the columns that data reached."""

    codes: Tensor
    lost: Tensor


def gptq(weight: Tensor, ranges: Sequence[QParams], factor: Factor, block_size: int = 128) -> list[Solved]:
    """`weight` [N, K] rounded in the grid of each of `ranges`, all of one spec.

    Columns that no data reached are rounded to nearest. The work is done on the transposed weight, whose rows are the
    columns that the algorithm goes through, so that each step reads memory in order; several ranges stand side by side,
    as if the weight had so many times its rows, which are independent of each other. Its steps are written with the
    rows of U divided by its diagonal, so that errors are plain ones. What is lost comes for free: `d H d^T` is the sum
    of the squares of `(w - q) / U_ii`.
    """
    (rows, columns), spec = weight.shape, ranges[0].spec
    order = torch.arange(columns, device=weight.device) if factor.order is None else factor.order
    scale, run = by_run([r.effective_scale for r in ranges], rows, columns, spec)
    zeros = [r.zero_point for r in ranges if r.zero_point is not None]
    zero = by_run(zeros, rows, columns, spec)[0].float() if zeros else None
    # [K, N x ranges]: the open columns, then in their place grid points
    steps = weight.float().t()[order].repeat(1, len(ranges))
    diagonal = factor.upper.diagonal()
    upper, weights = factor.upper / diagonal[:, None], torch.where(factor.dead, 0, diagonal.square().reciprocal())
    errors, lost = steps.new_empty(min(block_size, columns), steps.shape[1]), steps.new_zeros(steps.shape[1])
    codes = torch.empty_like(steps, dtype=storage_dtype(spec.dtype))
    round_block, one = _in_one_launch(steps.device, spec.dtype) or _round_columns, steps.new_ones(1)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        part, block, runs = slice(start, stop), errors[: stop - start], run[order[start:stop]]
        points = None if zero is None else zero[runs]
        round_block(steps[part], block, scale[runs], points, upper[part, part], spec.dtype)
        codes[order[part]] = quantize_elements(steps[part], one, points, spec.dtype)
        lost += weights[part] @ block.square()
        if stop < columns:
            steps[stop:].addmm_(upper[part, stop:].t(), block, alpha=-1)
    parts = zip(codes.split(rows, 1), lost.split(rows), strict=True)
    return [Solved(part.t().contiguous(), its) for part, its in parts]


_RoundColumns = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, DType], None]


def _round_columns(
    lines: Tensor, errors: Tensor, scale: Tensor, zero: Tensor | None, upper: Tensor, dtype: DType
) -> None:
    """See `wrapq.algorithms.gpu.gptq.round_columns`; for any grid on any device."""
    # views are made once for all: a column takes microseconds
    rows, its, scales, weights = lines.unbind(), errors.unbind(), scale.unbind(), upper.t().contiguous()
    zeros, done = [None] * len(lines) if zero is None else zero.unbind(), errors.t()
    for start in range(0, len(lines), _NEAR):  # what lies further back is taken off many columns at once
        stop = min(start + _NEAR, len(lines))
        if start:
            lines[start:stop].addmm_(weights[start:stop, :start], errors[:start], alpha=-1)
        for i in range(start, stop):
            column = torch.addmv(rows[i], done[:, start:i], weights[i, start:i], alpha=-1)
            line = torch.div(column, scales[i], out=rows[i])
            chosen = round_to_grid(line, zeros[i], dtype)
            if chosen is not line:
                line.copy_(chosen)
            torch.addcmul(column, line, scales[i], value=-1, out=its[i])


def _in_one_launch(device: torch.device, dtype: DType) -> _RoundColumns | None:
    """The loop over a block's columns as one kernel, where there is one."""
    if device.type != "cuda" or dtype.kind != "int":
        return None
    try:
        from wrapq.algorithms.gpu.gptq import round_columns
    except ImportError:  # torch brings Triton, except on Windows
        return None
    return round_columns


def best_of_each_row(tried: Sequence[Solved], ranges: Sequence[QParams]) -> tuple[Tensor, QParams]:
    """Of one weight [N, K] solved in several `ranges`, for each row the codes that lose least, and their parameters.

    Rows that share a scale are taken together.
    """
    if len(ranges) == 1:
        return tried[0].codes, ranges[0]
    spec, (rows, columns) = ranges[0].spec, tried[0].codes.shape
    tall = tile((rows, columns), spec)[0]
    lost = torch.stack([its.lost for its in tried])
    bands = pad(lost, (0, -rows % tall)).unflatten(1, (-1, tall)).sum(2)  # [ranges, N / tall]
    best = bands.argmin(0)
    picked = best.repeat_interleave(tall)[:rows]
    codes = torch.stack([its.codes for its in tried])[picked, torch.arange(rows, device=lost.device)]
    scale = _pick(best, [qparams.scale for qparams in ranges])
    zeros = [qparams.zero_point for qparams in ranges if qparams.zero_point is not None]
    return codes, QParams(spec, scale, _pick(best, zeros) if zeros else None, global_scale=ranges[0].global_scale)


def _pick(best: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Along the first axis of the stacked `values`, or as a whole where there is one choice for all, the best one."""
    if len(best) == 1:
        return values[int(best)]
    return torch.stack(list(values))[best, torch.arange(len(best), device=best.device)]


def input_correction(weight: Tensor, cross: Tensor, factor: Factor) -> Tensor:
    """What to add to `weight` [N, K] so that with the quantized model's inputs X it gives what W gives with F.

    The asymmetric objective `|W F - V X|^2` over V, which GPTAQ (Li et al., arXiv:2504.02692, equation 4) rounds by,
    differs from `|(W + D) X - V X|^2` by a constant, with `D = W C H^-1`, `C = (F - X)^T X` [K, K] and the damped
    Hessian H: rounding `W + D` by GPTQ minimizes it (the closed form of QEP, arXiv:2504.09629).
    """
    moved = weight.float() @ cross
    order = factor.order
    permuted = moved if order is None else moved[:, order]
    solved = (permuted @ factor.upper.t()) @ factor.upper
    if order is None:
        return solved
    result = torch.empty_like(solved)
    result[:, order] = solved
    return result


def by_run(values: Sequence[Tensor], rows: int, columns: int, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scales or zero points of a weight [N, K], of one or more ranges, side by side for each run of columns that share
    them [R, N x ranges], and the run of each column, int64 [K]."""
    tall, wide = tile((rows, columns), spec)
    by_row = [(v.repeat_interleave(tall, 0)[:rows] if spec.granularity == "block" else v) for v in values]
    runs = -(-columns // wide)
    lines = torch.cat([v.reshape(-1, v.shape[-1]).expand(rows, runs).t() for v in by_row], 1)
    return lines, torch.arange(columns, device=lines.device) // wide


def spread(value: Tensor, rows: int, columns: int, spec: QuantSpec) -> Tensor:
    """A scale or zero point of a weight [N, K], for each of its elements."""
    if spec.granularity == "group":
        value = value.repeat_interleave(spec.group_size or 1, dim=-1)
    elif spec.granularity == "block":
        tall, wide = spec.block_size or (1, 1)
        value = value.repeat_interleave(tall, dim=0)[:rows].repeat_interleave(wide, dim=1)[:, :columns]
    return value.expand(rows, columns)
