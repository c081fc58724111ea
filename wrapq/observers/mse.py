"""The range whose rounding and clipping errors are smallest together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from wrapq.observers.base import OBSERVERS, all_finite, scale_rows, weight_global_scale
from wrapq.observers.histogram import HistogramObserver, HistogramOptions, edges
from wrapq.quant.affine import (
    effective_scale,
    global_scale_for,
    range_to_qparams,
    reduce_range,
    round_to_grid,
    scale_shape,
)
from wrapq.quant.dtypes import DType
from wrapq.quant.rounded_scales import zero_in_steps
from wrapq.quant.spec import QuantSpec

STREAM_NORM, TENSOR_NORM = 2.0, 2.4
MX_FACTORS = (2.0, 1.0, 0.5, 0.25)
"""The candidates for scales that are powers of two; the next larger one ends what saturation the rule leaves."""
_SAMPLES = 8
"""Places in a bin at which the error of an uneven grid is taken."""


class MseOptions(HistogramOptions):
    """Options of `mse`.

    Attributes:
        norm: the power; None: 2 over a stream, 2.4 for a tensor at hand.
        grid: steps between 1 and 0.
        max_shrink: the largest share taken off the range.
    """

    norm: Annotated[float, Field(gt=0, le=16, strict=True)] | None = Field(None, description="above 0 and at most 16")
    grid: int = Field(100, ge=2, strict=True, description="a whole number of at least 2")
    max_shrink: float = Field(0.8, gt=0, lt=1, strict=True, description="above 0 and below 1")


@OBSERVERS.register("mse")
class Mse(HistogramObserver):
    """The best of the ranges `[f * low, f * high]` for factors f = 1, 1 - 1/grid, ... down to `1 - max_shrink`.

    Best is the least sum of `|x - fake_quantize(x)| ** norm`, for each scale by itself. The grid and, for a tensor at
    hand, the norm 2.4 are those of GPTQ's reference (`grid=100, maxshrink=.8, norm=2.4`), which llm-compressor searches
    too, to 0.2 only: 2-bit weights want factors down to 0.35, 8-bit ones hardly any below 0.98. A norm above 2 spares
    the large weights. Over a stream the sum is the expected one over a histogram. For e8m0 scales, which are powers of
    two, the factors are 2, 1, 1/2 and 1/4 whatever the options.
    """

    Options = MseOptions
    options: MseOptions

    def chosen(self, counts: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.bounds()
        norm = self.options.norm or STREAM_NORM
        factors = factors_for(self.spec, self.options.grid, self.options.max_shrink)
        global_scale = global_scale_for(low, high, self.spec)
        candidates = _candidates(low.reshape(-1, 1), high.reshape(-1, 1), factors, self.spec, global_scale)
        errors = (histogram_error(counts, width, *parameters, self.spec.dtype, norm) for parameters in candidates)
        best = best_factors(factors, errors).reshape(low.shape)
        return low * best, high * best

    def tensor_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        options = self.options
        return search_range(x, self.spec, options.norm or TENSOR_NORM, options.grid, options.max_shrink)


def search_range(
    x: Tensor, spec: QuantSpec, norm: float = TENSOR_NORM, grid: int = 100, max_shrink: float = 0.8
) -> tuple[Tensor, Tensor]:
    """The range, per scale, that quantizes `x` with the least `sum |error| ** norm`; see `Mse` for the candidates. NaN
    and inf come back as the unshrunk range that holds them."""
    low, high = reduce_range(x, spec)
    if not all_finite(low, high):
        return low, high
    rows = scale_rows(x, spec)  # [R, M]
    factors = factors_for(spec, grid, max_shrink)
    global_scale = weight_global_scale(low, high, spec)
    step = max(1, _chunk(x) // max(1, rows.shape[1]))
    chunks = zip(rows.split(step), low.reshape(-1, 1).split(step), high.reshape(-1, 1).split(step), strict=True)
    best = torch.cat([_search(r, lo, hi, factors, spec, norm, global_scale) for r, lo, hi in chunks])
    best = best.reshape(scale_shape(x.shape, spec))
    return low * best, high * best


def factors_for(spec: QuantSpec, grid: int, max_shrink: float) -> Sequence[float]:
    """What the whole range is multiplied with to give the candidates."""
    return MX_FACTORS if spec.scale_dtype == "e8m0" else shrink_factors(grid, max_shrink)


def shrink_factors(grid: int, max_shrink: float) -> list[float]:
    """1, 1 - 1/grid, ..., down to `1 - max_shrink`."""
    return [1 - i / grid for i in range(int(max_shrink * grid + 1e-6) + 1)]


def best_factors(factors: Sequence[float], errors: Iterator[Tensor]) -> Tensor:
    """For each row the factor with the least error; the largest of equals."""
    found = zip(factors, errors, strict=True)
    factor, least = next(found)
    best = torch.full_like(least, factor)
    for factor, error in found:
        best = torch.where(error < least, factor, best)
        least = torch.minimum(error, least)
    return best


def histogram_error(
    counts: Tensor, width: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: DType, norm: float
) -> Tensor:
    """The expected `sum |error| ** norm` of each row [R] of counts [R, 2n - 1], elements spread evenly in their bins.

    With u = x / scale and r the grid point it rounds to, `|u - r| ** norm` has the antiderivative
    `r * a + sign(u - r) |u - r| ** (norm + 1) / (norm + 1)`, a being its integral over one step. Beyond the grid r
    stays at the end and the formula still holds, so bins may be wider or narrower than steps. On grids whose steps
    differ the error is that at several places in each bin.
    """
    if dtype.kind != "int":
        return _sampled_error(counts, width, scale, dtype, norm)
    bins = (counts.shape[-1] + 1) // 2
    u = edges(bins, counts.device) * (width / scale)  # [R, 2n]
    r = round_to_grid(u.clone(), zero_point, dtype)
    d = u - r
    integral = d.sign() * d.abs().pow(norm + 1) / (norm + 1) + r * (2 * 0.5 ** (norm + 1) / (norm + 1))
    return (counts * (integral.diff() / u.diff())).sum(-1) * scale.squeeze(-1).abs() ** norm


def _sampled_error(counts: Tensor, width: Tensor, scale: Tensor, dtype: DType, norm: float) -> Tensor:
    edge = edges((counts.shape[-1] + 1) // 2, counts.device)
    total = torch.zeros(counts.shape[0], device=counts.device)
    for i in range(_SAMPLES):
        u = torch.lerp(edge[:-1], edge[1:], (i + 0.5) / _SAMPLES) * (width / scale)
        error = (round_to_grid(u.clone(), None, dtype) - u).abs_().pow_(norm)
        total += (counts * error).sum(-1)
    return total / _SAMPLES * scale.squeeze(-1).abs() ** norm


def _search(
    rows: Tensor,
    low: Tensor,
    high: Tensor,
    factors: Sequence[float],
    spec: QuantSpec,
    norm: float,
    global_scale: Tensor | None,
) -> Tensor:
    """The factor of least `sum |error| ** norm` for each row [R] of a matrix [R, M] with ranges [R, 1]."""
    step = rows.shape[1] if rows.shape[0] > 1 else _chunk(rows)
    pieces = [piece.float() for piece in rows.split(step, dim=1)]
    work = torch.empty_like(pieces[0]), torch.empty_like(pieces[0])

    def errors() -> Iterator[Tensor]:
        for scale, zero_point in _candidates(low, high, factors, spec, global_scale):
            total = torch.zeros(scale.shape[0], device=scale.device)
            for piece in pieces:
                steps, error = (buffer[:, : piece.shape[1]] for buffer in work)
                torch.div(piece, scale, out=steps)
                error.copy_(steps)
                error.sub_(round_to_grid(steps, zero_point, spec.dtype)).abs_()
                total += (error.square_() if norm == 2 else error.pow_(norm)).sum(-1)
            yield total * scale.squeeze(-1).abs() ** norm

    return best_factors(factors, errors())


def _candidates(
    low: Tensor, high: Tensor, factors: Sequence[float], spec: QuantSpec, global_scale: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    spec = spec.with_free_scales()
    for factor in factors:
        scale, zero_point = range_to_qparams(low * factor, high * factor, spec, global_scale)
        yield effective_scale(scale, global_scale), zero_in_steps(scale, zero_point, spec)


def _chunk(x: Tensor) -> int:
    """Elements to search at once: on a CPU what stays in a core's cache, elsewhere enough to fill the device."""
    return 1 << 18 if x.device.type == "cpu" else 1 << 24
