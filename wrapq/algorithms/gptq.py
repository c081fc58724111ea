"""GPTQ: rounding column by column, each column's error made good by those still open.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323,
algorithm 1. With `H = X^T X` and `H^-1 = U^T U`, column i is rounded, and `(w_i - q_i) / U_ii * U_i,j` is taken from
every column j > i.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from wrapq.algorithms.seqmse import search_ranges, unread_observer
from wrapq.calibration.algorithm import ALGORITHMS, Rounded, Rounder
from wrapq.calibration.factor import Factor
from wrapq.calibration.statistics import InputStatistics
from wrapq.observers.base import observe_tensor
from wrapq.quant.affine import quantize_elements, round_to_grid
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec


class GPTQOptions(BaseModel):
    """Options of GPTQ."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    damp: float = Field(0.01, gt=0, description="Added to the Hessian's diagonal, relative to its mean.")
    act_order: bool = Field(True, description="Round the columns with the largest inputs first.")
    ranges: Literal["observer", "hessian"] = Field(
        "observer", description="Ranges by the spec's observer, or by their error in the layer's output as seqmse does."
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
        statistics = statistics or InputStatistics()
        factor = statistics.factor(self.options.damp, self.options.act_order, where)
        if self.options.asymmetric and "cross" in statistics.sums:
            weight = weight + self.options.asymmetric * input_correction(
                weight, statistics.sums["cross"].float(), factor
            )
        if self.options.ranges == "hessian":
            qparams = search_ranges(weight, spec, statistics.get("hessian", where).float(), where)
        else:
            qparams = observe_tensor(weight, spec, where)
        report = {"damp": factor.damp, "dead_columns": float(factor.dead.sum())}
        return Rounded(gptq(weight, qparams, factor, self.options.block_size), qparams, report)


def gptq(weight: Tensor, qparams: QParams, factor: Factor, block_size: int = 128) -> Tensor:
    """The codes [N, K] for `weight` [N, K] in the grid of `qparams`.

    Columns that no data reached are rounded to nearest. The work is done on the transposed weight, whose rows are the
    columns that the algorithm goes through, so that each step reads memory in order.
    """
    rows, columns = weight.shape
    spec = qparams.spec
    order = torch.arange(columns, device=weight.device) if factor.order is None else factor.order
    scale = per_column(qparams.effective_scale, rows, columns, spec)[order]
    zero = None if qparams.zero_point is None else per_column(qparams.zero_point, rows, columns, spec)[order]
    steps = weight.float().t()[order].contiguous()  # [K, N]: the open columns, then in their place grid points
    upper, step = factor.upper, 1 / factor.upper.diagonal()
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        errors = torch.empty(stop - start, rows, device=weight.device)  # (w - q) / U_ii
        for i in range(start, stop):
            done = errors[: i - start]
            column = torch.addmv(steps[i], done.t(), upper[start:i, i], alpha=-1)
            chosen = round_to_grid(column / scale[i], None if zero is None else zero[i], spec.dtype)
            steps[i] = chosen
            torch.mul(column.sub_(chosen.mul_(scale[i])), step[i], out=errors[i - start])
        if stop < columns:
            steps[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    codes = quantize_elements(steps, torch.ones(1, device=weight.device), zero, spec.dtype)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous()


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


def per_column(value: Tensor, rows: int, columns: int, spec: QuantSpec) -> Tensor:
    """A scale or zero point of a weight [N, K] as float32 [K, N]."""
    if spec.granularity == "group":
        value = value.repeat_interleave(spec.group_size or 1, dim=-1)
    elif spec.granularity == "block":
        tall, wide = spec.block_size or (1, 1)
        value = value.repeat_interleave(tall, dim=0)[:rows].repeat_interleave(wide, dim=1)[:, :columns]
    return value.float().expand(rows, columns).t()
