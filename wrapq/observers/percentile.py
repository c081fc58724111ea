"""The range that leaves out a given share of the data at each end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wrapq.observers.base import OBSERVERS, check_option, scale_rows
from wrapq.observers.histogram import HistogramObserver, edges
from wrapq.quant.affine import reduce_range, scale_shape
from wrapq.quant.spec import QuantSpec


@OBSERVERS.register("percentile")
class Percentile(HistogramObserver):
    """From the quantile `1 - percentile / 100` to the quantile `percentile / 100`, per scale.

    Over a stream the quantiles are those of a histogram, right within the width of a bin, which is at most
    `absmax / 2048` for one scale and `absmax / 256` per channel (see `bins`); merging is exact and the order of the
    data does not matter. For a tensor at hand they are exact (linear interpolation, as `torch.quantile`).

    Raises:
        SpecError: `percentile` is not above 50 and at most 100.
    """

    def __init__(self, spec: QuantSpec, percentile: float = 99.99, bins: int | None = None) -> None:
        super().__init__(spec, bins)
        check_option(spec, "percentile", percentile, lambda v: 50 < v <= 100, "above 50 and at most 100")
        self.share = percentile / 100

    def range(self) -> tuple[Tensor, Tensor]:
        """Both quantiles of the histogram; at 100 the exact bounds."""
        low, high = self.bounds()
        if self.share == 1 or not self.finite():
            return low, high
        counts, width = self.histogram()
        quantiles = (
            histogram_quantile(counts, width, share).reshape(low.shape) for share in (1 - self.share, self.share)
        )
        below, above = (quantile.clamp(low, high) for quantile in quantiles)
        return below, above

    def tensor_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both quantiles of `x`."""
        low, high = reduce_range(x, self.spec)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            return low, high
        rows, shape = scale_rows(x, self.spec).float(), scale_shape(x.shape, self.spec)
        below, above = (quantile(rows, share).reshape(shape) for share in (1 - self.share, self.share))
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
