"""Rounding to nearest."""

from __future__ import annotations

from torch import Tensor

from wrapq.algorithms.base import ALGORITHMS, Rounded, Rounder
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.input import InputStatistics


@ALGORITHMS.register("rtn")
class RTN(Rounder):
    """Each weight goes to the nearest point of its grid, whose range the spec's observer chooses: `minmax` spans every
    weight; `mse` clips where that lowers the error of the rest. Needs no data."""

    def round(self, weight: Tensor, spec: QuantSpec, where: str, statistics: InputStatistics | None = None) -> Rounded:
        qparams = observe_tensor(weight, spec, where)
        return Rounded(qparams.quantize(weight), qparams)
