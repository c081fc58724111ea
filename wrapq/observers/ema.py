"""The range of a batch, averaged over batches with weights that fade."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from wrapq.observers.base import OBSERVERS, Observer, check_option, joined, stream_range
from wrapq.observers.minmax import bounds
from wrapq.quant.spec import QuantSpec


@OBSERVERS.register("ema")
class Ema(Observer):
    """Exponential moving average of each update's smallest and largest element.

    The first update sets the range; each later one moves it: `range = momentum * range + (1 - momentum) * batch`.
    `momentum` is the weight of the past, as in TICO (0.9 there too); llm-compressor's `averaging_constant`, 0.01, is
    `1 - momentum`. The order of updates matters, unlike for the other observers.

    Raises:
        SpecError: `momentum` is not in [0, 1).
    """

    STATE = ("low", "high", "first_low", "first_high", "updates")
    low: Tensor | None
    high: Tensor | None
    first_low: Tensor
    first_high: Tensor
    updates: Tensor

    def __init__(self, spec: QuantSpec, momentum: float = 0.9) -> None:
        super().__init__(spec)
        check_option(spec, "momentum", momentum, lambda v: 0 <= v < 1, "at least 0 and below 1")
        self.momentum = momentum

    def update(self, x: Tensor) -> None:
        """Move the range towards that of `x`."""
        if not x.numel():
            return
        low, high = stream_range(x.detach(), self.spec)
        if self.low is None or self.high is None:
            self.low, self.high, self.first_low, self.first_high = low, high, low, high
            self.updates = torch.ones(1, dtype=torch.int64)
            return
        self.low = self._moved(self.low, joined(self.low, low, self.spec))
        self.high = self._moved(self.high, joined(self.high, high, self.spec))
        self.updates = self.updates + 1

    def merge(self, other: Self) -> None:
        """Continue with the updates of `other`, as if they had followed here; exact to the last bits of float32."""
        if other.empty:
            return
        if self.empty:
            self.load_state_dict(other.state_dict())
            return
        low, high = bounds(self.low, self.high)
        kept = self.momentum ** int(other.updates)
        # the first update of `other` set its range outright and so weighs `kept` too much in it
        self.low = joined(low, other.range()[0], self.spec) + kept * (low - other.first_low.to(low.device))
        self.high = joined(high, other.range()[1], self.spec) + kept * (high - other.first_high.to(high.device))
        self.updates = self.updates + other.updates.to(self.updates.device)

    def range(self) -> tuple[Tensor, Tensor]:
        """The averaged bounds, per scale."""
        return bounds(self.low, self.high)

    def _moved(self, past: Tensor, batch: Tensor) -> Tensor:
        return self.momentum * past + (1 - self.momentum) * batch
