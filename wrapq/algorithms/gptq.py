"""GPTQ: rounding column by column, each column's error made good by those still open.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323,
algorithm 1. With `H = X^T X` and `H^-1 = U^T U`, column i is rounded, and `(w_i - q_i) / U_ii * U_i,j` is taken from
every column j > i.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import pad

from wrapq.algorithms.columns import Solved, gptq, stacks
from wrapq.algorithms.seqmse import best_ranges, output_error, search_ranges, tile, unread_observer, weight_error
from wrapq.calibration.algorithm import ALGORITHMS, Rounded, Rounder
from wrapq.calibration.factor import Factor
from wrapq.calibration.statistics import InputStatistics
from wrapq.observers.base import observe_tensor
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import DEFAULT_OBSERVER, QuantSpec

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
    groups_at_once = True  # for the ranges, which are found for all rows together

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
        return self.round_each(weight, [spec], where, statistics)[0]

    def round_each(
        self, weight: Tensor, specs: Sequence[QuantSpec], where: str, statistics: InputStatistics | None = None
    ) -> list[Rounded]:
        """See `Rounder.round_each`: all on one factorization, those that can be stacked row by row."""
        statistics, weight = statistics or InputStatistics(), weight.float()
        hessian, count = statistics.get("hessian", where).float(), statistics.groups
        groups = [statistics] if count == 1 else [statistics.group(index) for index in range(count)]
        factors = [its.factor(self.options.damp, self.options.act_order, where) for its in groups]
        if self.options.asymmetric and "cross" in statistics.sums:
            parts = zip(weight.chunk(count), groups, factors, strict=True)
            moved = [input_correction(rows, its.sums["cross"].float(), factor) for rows, its, factor in parts]
            weight = weight + self.options.asymmetric * torch.cat(moved)
        tried = [self._ranges(weight, spec, hessian, where) for spec in specs]
        report = {
            "damp": max(factor.damp for factor in factors),
            "dead_columns": float(sum(factor.dead.sum() for factor in factors)),
        }
        rounded: dict[int, Rounded] = {}
        for stack in stacks(weight, tried):
            ranges = [each for index in stack for each in tried[index]]
            solved = iter(self._solved(weight, ranges, factors))
            for index in stack:
                own = list(islice(solved, len(tried[index])))
                rounded[index] = Rounded(*best_of_each_row(own, tried[index]), report)
        return [rounded[index] for index in range(len(specs))]

    def _solved(self, weight: Tensor, ranges: Sequence[QParams], factors: Sequence[Factor]) -> list[Solved]:
        """`weight` in each of `ranges`, the rows of each group with its own factor."""
        parts, size = weight.chunk(len(factors)), len(weight) // len(factors)
        done = [
            gptq(rows, ranges, factor, self.options.block_size, index * size)
            for index, (rows, factor) in enumerate(zip(parts, factors, strict=True))
        ]
        if len(done) == 1:
            return done[0]
        several = zip(*done, strict=True)
        return [Solved(torch.cat([s.codes for s in its]), torch.cat([s.lost for s in its])) for its in several]

    def _ranges(self, weight: Tensor, spec: QuantSpec, hessian: Tensor, where: str) -> list[QParams]:
        if self.options.ranges == "hessian":
            return [search_ranges(weight, spec, hessian, where)]
        if self.options.ranges == "observer":
            return [observe_tensor(weight, spec, where)]
        observed = [] if spec.observer == DEFAULT_OBSERVER else [observe_tensor(weight, spec, where)]
        measures, together = [output_error(hessian, spec), weight_error], hessian.dim() == 3
        return [*observed, *best_ranges(weight, spec, where, measures, CANDIDATES, SMALLEST, together)]


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
