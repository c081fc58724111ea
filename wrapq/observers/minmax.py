"""The range of everything seen."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from wrapq.observers.base import OBSERVERS, Observer, joined, stream_range


@OBSERVERS.register("minmax")
class MinMax(Observer):
    """Smallest and largest element seen; merging is exact and the order of the data does not matter."""

    STATE: tuple[str, ...] = ("low", "high")
    in_parts = True
    low: Tensor
    high: Tensor

    def update(self, x: Tensor) -> None:
        if x.numel():
            self._widen(*stream_range(x.detach(), self.spec))

    def merge(self, other: Self) -> None:
        if not other.empty:
            self._widen(other.low, other.high)

    def range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high

    def _widen(self, low: Tensor, high: Tensor) -> None:
        if not self.empty:
            low = torch.minimum(self.low, joined(self.low, low, self.spec))
            high = torch.maximum(self.high, joined(self.high, high, self.spec))
        self.low, self.high = low, high
