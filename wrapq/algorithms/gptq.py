"""GPTQ: rounding column by column, each column's error made good by those still open.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323,
algorithm 1. With `H = X^T X` and `H^-1 = U^T U`, column i is rounded, and `(w_i - q_i) / U_ii * U_i,j` is taken from
every column j > i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from wrapq.algorithms.base import ALGORITHMS, Rounded, Rounder
from wrapq.algorithms.columns import Solved, gptq
from wrapq.algorithms.descent import descend
from wrapq.algorithms.least_squares import fitted_ranges, unfitted
from wrapq.algorithms.seqmse import best_ranges, output_error, search_ranges, tile, unread_observer, weight_error
from wrapq.observers.base import observe_tensor
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import DEFAULT_OBSERVER, QuantSpec
from wrapq.registry import Options
from wrapq.statistics.cholesky import Factor
from wrapq.statistics.input import InputStatistics

CANDIDATES, SMALLEST = 9, 0.6
"""The ranges that are tried: clipping more suits rounding to nearest, while here the open columns bear the error."""


class GPTQOptions(Options):
    """Options of GPTQ."""

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
    sweeps: int = Field(0, ge=0, description="How often all codes are gone through again afterwards, one by one.")
    gradient: bool = Field(
        False, description="Count tokens by how much the model's loss depends on what the layer makes of them."
    )
    precision: Literal["float32", "float64"] = Field("float32", description="What the Hessian is summed in.")
    block_size: int = Field(128, ge=1, description="Columns between two updates of all that are still open.")


@ALGORITHMS.register("gptq")
class GPTQ(Rounder):
    """GPTQ with ranges fixed beforehand (static groups), so that any column order keeps its groups."""

    Options = GPTQOptions
    options: GPTQOptions
    groups_at_once = True  # for the ranges, which are found for all rows together

    @property
    def needs(self) -> tuple[str, ...]:
        more = (
            ("cross", self.options.asymmetric),
            ("gradient", self.options.gradient),
            ("float64", self.options.precision == "float64"),
        )
        return ("hessian", *(need for need, wanted in more if wanted))

    def unsupported(self, spec: QuantSpec) -> str | None:
        return unread_observer(spec) if self.options.ranges == "hessian" else None

    def round(self, weight: Tensor, spec: QuantSpec, where: str, statistics: InputStatistics | None = None) -> Rounded:
        statistics, weight = statistics or InputStatistics(), weight.float()
        hessian, count = statistics.get("hessian", where).float(), statistics.groups
        groups = [statistics] if count == 1 else [statistics.group(index) for index in range(count)]
        factors = [group.factor(self.options.damp, self.options.act_order, where) for group in groups]
        if self.options.asymmetric and "cross" in statistics.sums:
            parts = zip(weight.chunk(count), groups, factors, strict=True)
            moved = [input_correction(rows, group.sums["cross"].float(), factor) for rows, group, factor in parts]
            weight = weight + self.options.asymmetric * torch.cat(moved)
        ranges = self._ranges(weight, spec, hessian, where)
        report = {"damp": max(f.damp for f in factors), "dead_columns": float(sum(f.dead.sum() for f in factors))}
        codes, qparams = best_of_each_row(self._solved(weight, ranges, factors), ranges)
        if self.options.sweeps:
            codes = descend(weight, codes, qparams, _damped(hessian, factors), self.options.sweeps)
        return Rounded(codes, qparams, report)

    def _solved(self, weight: Tensor, ranges: Sequence[QParams], factors: Sequence[Factor]) -> list[Solved]:
        """`weight` in each of `ranges`, the rows of each group with its own factor."""
        size = len(weight) // len(factors)
        done: list[list[Solved]] = []
        for rows, factor in zip(weight.chunk(len(factors)), factors, strict=True):
            done.append(gptq(rows, ranges, factor, self.options.block_size, len(done) * size))
        if len(done) == 1:
            return done[0]
        return [Solved(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*done, strict=True)]

    def _ranges(self, weight: Tensor, spec: QuantSpec, hessian: Tensor, where: str) -> list[QParams]:
        if self.options.ranges == "hessian":
            return [search_ranges(weight, spec, hessian, where)]
        if self.options.ranges == "observer":
            return [observe_tensor(weight, spec, where)]
        observed = [] if spec.observer == DEFAULT_OBSERVER else [observe_tensor(weight, spec, where)]
        measures, together = [output_error(hessian, spec), weight_error], hessian.dim() == 3
        found = [*observed, *best_ranges(weight, spec, where, measures, CANDIDATES, SMALLEST, together)]
        if not together and (spec.super_blocks or spec.zero_point == "min") and not unfitted(spec):
            found.append(fitted_ranges(weight, spec, hessian.diagonal(), where))  # no observer knows what these share
        return found


def _damped(hessian: Tensor, factors: Sequence[Factor]) -> Tensor:
    """`hessian` [K, K] or [G, K, K] with the damping that its factors took."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    damp = diagonal.new_tensor([factor.damp for factor in factors]).reshape(diagonal.shape[:-1])
    return hessian + torch.diag_embed((damp * diagonal.mean(-1))[..., None].expand_as(diagonal))


def best_of_each_row(tried: Sequence[Solved], ranges: Sequence[QParams]) -> tuple[Tensor, QParams]:
    """Of one weight [N, K] solved in several `ranges`, for each row the codes that lose least, and their parameters;
    rows that share a scale are taken together."""
    if len(ranges) == 1:
        return tried[0].codes, ranges[0]
    spec, (rows, columns) = ranges[0].spec, tried[0].codes.shape
    tall = tile((rows, columns), spec)[0]
    lost = torch.stack([solved.lost for solved in tried])
    bands = pad(lost, (0, -rows % tall)).unflatten(1, (-1, tall)).sum(2)  # [ranges, N / tall]
    best = bands.argmin(0)
    picked = best.repeat_interleave(tall)[:rows]
    codes = torch.stack([solved.codes for solved in tried])[picked, torch.arange(rows, device=lost.device)]

    def pick(values: list[Tensor]) -> Tensor:
        return torch.stack(values)[best, torch.arange(len(best), device=lost.device)]

    zeros = [qparams.zero_point for qparams in ranges if qparams.zero_point is not None]
    scale, zero_point = pick([qparams.scale for qparams in ranges]), pick(zeros) if zeros else None
    return codes, QParams(spec, scale, zero_point, global_scale=ranges[0].global_scale)


def input_correction(weight: Tensor, cross: Tensor, factor: Factor) -> Tensor:
    """What to add to `weight` [N, K] so that with the quantized model's inputs X it gives what W gives with F.

    The asymmetric objective `|W F - V X|^2` over V, which GPTAQ (Li et al., arXiv:2504.02692, equation 4) rounds by,
    differs from `|(W + D) X - V X|^2` by a constant, with `D = W C H^-1`, `C = (F - X)^T X` [K, K] and the damped
    Hessian H: rounding `W + D` by GPTQ minimizes it (the closed form of QEP, arXiv:2504.09629).
    """
    moved, order = weight.float() @ cross, slice(None) if factor.order is None else factor.order
    moved[:, order] = (moved[:, order] @ factor.upper.t()) @ factor.upper
    return moved
