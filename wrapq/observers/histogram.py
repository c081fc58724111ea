"""Histograms, one row for each scale, that do not depend on the order of the data and merge exactly.

The bins of a row are `w = 2**exponent` wide and their edges are multiples of w: bin i > 0 is [i w, (i + 1) w), bin -i
is its mirror image, and bin 0 is (-w, w). An element's bin is therefore `trunc(x / w)`, exact in floating point, and
`trunc(trunc(x / w) / 2) == trunc(x / 2w)`: doubling w merges pairs of bins and gives the very counts that the wider
bins would have gathered. The exponent is the smallest at which the largest magnitude seen has a bin.

Letters: R rows, n bins to a side, hence 2n - 1 bins.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

import torch
from pydantic import AfterValidator, BaseModel, Field
from torch import Tensor

from wrapq.errors import SpecError
from wrapq.observers.base import all_finite, stream_range
from wrapq.observers.minmax import MinMax
from wrapq.quant.affine import split_groups
from wrapq.quant.spec import QuantSpec
from wrapq.registry import Options

LEAST_EXPONENT = -126
"""That of the smallest normal float32; bins are never narrower."""
TENSOR_BINS, CHANNEL_BINS = 4096, 512


def _checked(value: int) -> int:
    if value & (value - 1):
        raise ValueError("no power of two")
    return value


class HistogramOptions(Options):
    """Options of all that gather a histogram: `bins` to a side; None: 4096 for one scale, 512 for each of many (8 KiB a
    channel)."""

    bins: Annotated[int, Field(ge=16, strict=True), AfterValidator(_checked)] | None = Field(
        None, description="a power of two of at least 16"
    )


class HistogramObserver(MinMax):
    """Gathers a histogram and the exact bounds; subclasses choose a range from them."""

    Options: ClassVar[type[BaseModel]] = HistogramOptions
    options: HistogramOptions

    STATE = (*MinMax.STATE, "exponent", "counts")
    exponent: Tensor
    counts: Tensor

    @property
    def bins(self) -> int:
        """Bins to a side."""
        return self.options.bins or (TENSOR_BINS if self.target.granularity == "tensor" else CHANNEL_BINS)

    def update(self, x: Tensor) -> None:
        """Count the elements of `x`; NaN and inf are kept in the bounds, where `qparams` finds them."""
        if not x.numel():
            return
        x = x.detach().float()
        low, high = stream_range(x, self.spec)
        self._widen(low, high)
        if all_finite(low, high):
            self._grow(exponents(low, high, self.bins))
            self.counts += count(x, self.exponent, self.bins, self.spec)

    def merge(self, other: Self) -> None:
        if other.empty:
            return
        if other.bins != self.bins:
            raise SpecError(f"{self.spec}: {other.bins} bins do not merge into {self.bins}")
        self._widen(other.low, other.high)
        theirs = other.exponent.to(self.low.device)
        self._grow(theirs)
        self.counts += coarsen(other.counts.to(self.counts.device), self.exponent - theirs)

    def range(self) -> tuple[Tensor, Tensor]:
        return self.chosen(*self.histogram()) if all_finite(*self.bounds()) else self.bounds()

    def chosen(self, counts: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """The range to choose by the `histogram` of data that is finite; all of it unless overridden."""
        return self.bounds()

    def bounds(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high

    def histogram(self) -> tuple[Tensor, Tensor]:
        """Counts [R, 2n - 1] and bin width [R, 1]."""
        return self.counts, power_of_two(self.exponent).reshape(-1, 1)

    def _widen(self, low: Tensor, high: Tensor) -> None:
        if self.empty:
            self.exponent = torch.full_like(low, LEAST_EXPONENT, dtype=torch.int32)
            self.counts = torch.zeros(low.numel(), 2 * self.bins - 1, dtype=torch.int64, device=low.device)
        super()._widen(low, high)

    def _grow(self, needed: Tensor) -> None:
        grown = torch.maximum(self.exponent, needed.to(self.exponent.device))
        if not torch.equal(grown, self.exponent):
            self.counts = coarsen(self.counts, grown - self.exponent)
        self.exponent = grown


def exponents(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """The least exponents, int32, at which all of `low` to `high` has a bin: `max(-low, high) < bins * 2**exponent`."""
    bound = torch.maximum(low.abs(), high.abs())
    needed = torch.frexp(bound).exponent.to(torch.int32) - (bins.bit_length() - 1)
    return torch.where(bound == 0, LEAST_EXPONENT, needed.clamp(min=LEAST_EXPONENT)).to(torch.int32)


def power_of_two(exponent: Tensor) -> Tensor:
    """`2.0**exponent` exactly, for exponents of normal float32 numbers (`pow` may miss the last bit)."""
    return ((exponent + 127) << 23).view(torch.float32)


def count(x: Tensor, exponent: Tensor, bins: int, spec: QuantSpec) -> Tensor:
    """Counts [R, 2n - 1] of the elements of `x` in bins of `exponent`, which is shaped like the scale."""
    if spec.granularity == "group":
        x, exponent = split_groups(x, spec), exponent.unsqueeze(-1)
    rows, columns = exponent.numel(), 2 * bins - 1
    small = rows * columns < 1 << 31
    index = (x * power_of_two(-exponent)).to(torch.int32 if small else torch.int64)  # the cast truncates
    starts = torch.arange(rows, dtype=index.dtype, device=x.device) * columns + (bins - 1)
    index += starts.reshape(exponent.shape)
    return torch.bincount(index.flatten(), minlength=rows * columns).reshape(rows, columns)


def coarsen(counts: Tensor, doublings: Tensor) -> Tensor:
    """The counts [R, 2n - 1] after each row's bins have doubled in width `doublings` times."""
    bins = (counts.shape[-1] + 1) // 2
    index = torch.arange(1 - bins, bins, device=counts.device)
    shifted = index.sign() * (index.abs() >> doublings.reshape(-1, 1).clamp(max=62))
    return torch.zeros_like(counts).scatter_add_(1, shifted + (bins - 1), counts)


def edges(bins: int, device: torch.device) -> Tensor:
    """The 2n edges between which the bins lie, in bin widths: -n ... -1, 1 ... n."""
    side = torch.arange(1, bins + 1, dtype=torch.float32, device=device)
    return torch.cat([-side.flip(0), side])
