"""Ranges of static activations."""

from __future__ import annotations

from wrapq.algorithms.base import ALGORITHMS, RangeSetter
from wrapq.observers.base import Observer
from wrapq.quant.qparams import QParams


@ALGORITHMS.register("ranges")
class Ranges(RangeSetter):
    """Each static activation point takes the range that its spec's observer found over the calibration data."""

    def choose(self, observer: Observer, where: str) -> QParams:
        return observer.qparams(where)
