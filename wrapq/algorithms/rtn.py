"""Rounding to nearest."""

from __future__ import annotations

from torch import Tensor

from wrapq.calibration.algorithm import ALGORITHMS, Rounded, Rounder
from wrapq.calibration.statistics import InputStatistics
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec


@ALGORITHMS.register("rtn")
class RTN(Rounder):
    """Each weight goes to the nearest point of its grid, whose range the spec's observer chooses.

    `minmax` spans every weight; `mse` clips where that lowers the error of the rest. Needs no data.
    """

    def round(self, weight: Tensor, spec: QuantSpec, where: str, statistics: InputStatistics | None = None) -> Rounded:
        """See `Rounder.round`."""
        qparams = observe_tensor(weight, spec, where)
        return Rounded(qparams.quantize(weight), qparams)
