"""The range of a batch, averaged over batches with weights that fade."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field
from torch import Tensor

from wrapq.observers.base import OBSERVERS, joined, stream_range
from wrapq.observers.minmax import MinMax
from wrapq.registry import Options


class EmaOptions(Options):
    """Options of `ema`."""

    momentum: float = Field(0.9, ge=0, lt=1, strict=True, description="at least 0 and below 1")


@OBSERVERS.register("ema")
class Ema(MinMax):
    """Exponential moving average of each update's smallest and largest element.

    The first update sets the range; each later one moves it: `range = momentum * range + (1 - momentum) * batch`.
    `momentum` is the weight of the past, as in TICO (0.9 there too); llm-compressor's `averaging_constant`, 0.01, is
    `1 - momentum`. The order of updates matters, unlike for the other observers.
    """

    Options = EmaOptions
    options: EmaOptions

    in_parts = False
    STATE = (*MinMax.STATE, "first_low", "first_high", "updates")
    first_low: Tensor
    first_high: Tensor
    updates: Tensor

    def update(self, x: Tensor) -> None:
        if not x.numel():
            return
        low, high = stream_range(x.detach(), self.spec)
        if self.empty:
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
        low, high = self.low, self.high
        kept = self.options.momentum ** int(other.updates)
        # the first update of `other` set its range outright and so weighs `kept` too much in it
        self.low = joined(low, other.low, self.spec) + kept * (low - other.first_low.to(low.device))
        self.high = joined(high, other.high, self.spec) + kept * (high - other.first_high.to(high.device))
        self.updates = self.updates + other.updates.to(self.updates.device)

    def _moved(self, past: Tensor, batch: Tensor) -> Tensor:
        momentum = self.options.momentum
        return momentum * past + (1 - momentum) * batch
