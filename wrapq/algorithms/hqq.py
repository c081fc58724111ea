"""HQQ: ranges that suit a heavy-tailed error of the weights; needs no data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). The `lp` norm, p < 1, of
`W - s * (q - z)` is split by an error E that stands apart: `E = shrink(W - s * (q - z))`, equation 4, and then the
zero point, or the scale where there is none, in closed form, equation 8.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from wrapq.algorithms.base import ALGORITHMS, Rounded, Rounder
from wrapq.observers.base import observe_tensor, scale_rows
from wrapq.quant.affine import round_to_grid
from wrapq.quant.qparams import QParams
from wrapq.quant.rounded_scales import TINY, round_scale, round_zero_point
from wrapq.quant.spec import QuantSpec
from wrapq.registry import Options
from wrapq.statistics.input import InputStatistics


class HQQOptions(Options):
    """Options of HQQ."""

    p: float = Field(0.7, gt=0, le=1, description="The norm of the error; the less, the more outliers are let go.")
    beta: float = Field(10.0, gt=0, description="How closely the error that stands apart follows the true one.")
    kappa: float = Field(1.01, ge=1, description="What beta grows by at each step.")
    iterations: int = Field(20, ge=1, description="Steps.")


@ALGORITHMS.register("hqq")
class HQQ(Rounder):
    """Rounding to nearest with zero points by HQQ, or with scales by it on symmetric grids. Starts from the ranges of
    the spec's observer; zero points end as the spec has them, in the paper as floats."""

    Options = HQQOptions
    options: HQQOptions

    def unsupported(self, spec: QuantSpec) -> str | None:
        if spec.scale_dtype == "e8m0" or spec.global_scale or spec.super_blocks:
            return f"its scales are {'powers of two' if spec.scale_dtype == 'e8m0' else 'relative'}, not free"
        return "it finds zero points, and a minimum is none" if spec.zero_point == "min" else None

    def round(self, weight: Tensor, spec: QuantSpec, where: str, statistics: InputStatistics | None = None) -> Rounded:
        start = observe_tensor(weight, spec, where)
        rows = scale_rows(weight.float(), spec)
        zero = None if start.zero_point is None else start.zero_point.reshape(-1, 1).float()
        scale, zero = half_quadratic(rows, start.scale.reshape(-1, 1), zero, spec, self.options)
        zero_point = None if zero is None else zero.reshape(start.scale.shape)
        qparams = QParams(spec, scale.reshape(start.scale.shape).contiguous(), zero_point)
        return Rounded(qparams.quantize(weight), qparams)


def half_quadratic(
    rows: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, options: HQQOptions
) -> tuple[Tensor, Tensor | None]:
    """Better `scale` and `zero` [R, 1] for `rows` [R, M], each row under one scale; all rows at once.

    An asymmetric grid keeps its scale and moves its zero point, which becomes what the spec stores; a symmetric one
    keeps its zero and takes the scale that fits its codes best. Each row ends with what had the least `sum |W - W~|^p`.
    """
    dtype, p, beta = spec.dtype, options.p, options.beta

    def error(scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        stored = None if zero is None else round_zero_point(zero, spec)
        grid = round_to_grid(rows / scale, stored, dtype)
        lost = rows - grid * scale
        return lost.abs().pow(p).sum(1, keepdim=True), lost, grid

    best, lost, grid = error(scale, zero)
    kept_scale, kept_zero = scale, zero
    for _ in range(options.iterations):
        if spec.symmetric or zero is None:
            near = rows - _shrink(lost, beta, p)
            power = (grid * grid).sum(1, keepdim=True)
            fitted = (grid * near).sum(1, keepdim=True) / power.clamp(min=TINY)
            scale = round_scale(torch.where((power > 0) & (fitted > TINY), fitted, scale), spec)
        else:
            # the codes are as the free zero point makes them, q - z = grid
            codes = (rows / scale).add_(zero).round_().clamp_(dtype.qmin, dtype.qmax)
            apart = _shrink(rows - (codes - zero) * scale, beta, p)
            zero = (codes - (rows - apart) / scale).mean(1, keepdim=True)
        beta *= options.kappa
        found, lost, grid = error(scale, zero)
        better = found < best
        best = torch.where(better, found, best)
        kept_scale = torch.where(better, scale, kept_scale)
        kept_zero = None if zero is None or kept_zero is None else torch.where(better, zero, kept_zero)
    return kept_scale, None if kept_zero is None else round_zero_point(kept_zero, spec)


def _shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """The generalized soft threshold `sign(x) * max(0, |x| - |x|^(p-1) / beta)`."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=TINY).pow(p - 1) / beta).clamp_(min=0)
