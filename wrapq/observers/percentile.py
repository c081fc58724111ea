"""The range that leaves out a given share of the data at each end."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from wrapq.observers.base import OBSERVERS, all_finite, scale_rows
from wrapq.observers.histogram import HistogramObserver, HistogramOptions, edges
from wrapq.quant.affine import reduce_range


class PercentileOptions(HistogramOptions):
    """Options of `percentile`."""

    percentile: float = Field(99.99, gt=50, le=100, strict=True, description="above 50 and at most 100")


@OBSERVERS.register("percentile")
class Percentile(HistogramObserver):
    """From the quantile `1 - percentile / 100` to the quantile `percentile / 100`, per scale.

    Over a stream the quantiles are those of a histogram, right within the width of a bin, which is at most
    `absmax / 2048` for one scale and `absmax / 256` per channel (see `bins`); merging is exact and the order of the
    data does not matter. For a tensor at hand they are exact (linear interpolation, as `torch.quantile`).
    """

    Options = PercentileOptions
    options: PercentileOptions

    def chosen(self, counts: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        (low, high), top = self.bounds(), self.options.percentile / 100
        if top == 1:
            return low, high
        quantiles = (histogram_quantile(counts, width, share) for share in (1 - top, top))
        below, above = (quantile.reshape(low.shape).clamp(low, high) for quantile in quantiles)
        return below, above

    def tensor_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = reduce_range(x, self.spec)
        if not all_finite(low, high):
            return low, high
        rows, top = scale_rows(x, self.spec).float(), self.options.percentile / 100
        below, above = (quantile(rows, share).reshape(low.shape) for share in (1 - top, top))
        return below, above


def quantile(rows: Tensor, share: float) -> Tensor:
    """The quantile `share` of each row [R, M], as `torch.quantile` but of any size."""
    rank = share * (rows.shape[-1] - 1)
    below = rows.kthvalue(math.floor(rank) + 1, dim=-1).values
    above = rows.kthvalue(math.ceil(rank) + 1, dim=-1).values
    return torch.lerp(below, above, rank - math.floor(rank))


def histogram_quantile(counts: Tensor, width: Tensor, share: float) -> Tensor:
    """The quantile `share` of each row of counts [R, 2n - 1], with the elements of a bin spread evenly in it."""
    cumulative = counts.cumsum(-1)
    rank = share * (cumulative[:, -1:] - 1).double()
    below = _ranked(counts, cumulative, rank.floor().long())
    above = _ranked(counts, cumulative, rank.ceil().long())
    return torch.lerp(below, above, rank.frac().float()) * width


def _ranked(counts: Tensor, cumulative: Tensor, rank: Tensor) -> Tensor:
    """The element of the given rank [R, 1], in bin widths; rank 0 is the smallest."""
    edge = edges((counts.shape[-1] + 1) // 2, counts.device)
    index = torch.searchsorted(cumulative, rank, right=True)
    inside = counts.gather(-1, index)
    before = cumulative.gather(-1, index) - inside
    part = (rank - before + 0.5) / inside
    return torch.lerp(edge[index], edge[index + 1], part.float())
