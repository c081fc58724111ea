"""The range of everything seen."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from wrapq.observers.base import OBSERVERS, Observer, joined, stream_range


@OBSERVERS.register("minmax")
class MinMax(Observer):
    """Smallest and largest element seen; merging is exact and the order of the data does not matter."""

    STATE = ("low", "high")
    low: Tensor | None
    high: Tensor | None

    def update(self, x: Tensor) -> None:
        """Widen the range to hold `x`."""
        if x.numel():
            self._widen(*stream_range(x.detach(), self.spec))

    def merge(self, other: Self) -> None:
        """Widen the range to hold that of `other`."""
        if not other.empty:
            self._widen(*other.range())

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest element, per scale."""
        return bounds(self.low, self.high)

    def _widen(self, low: Tensor, high: Tensor) -> None:
        low, high = joined(self.low, low, self.spec), joined(self.high, high, self.spec)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


def bounds(low: Tensor | None, high: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both bounds, which an observer that has seen data always has."""
    if low is None or high is None:
        raise RuntimeError("range() of an observer that saw no data")
    return low, high
