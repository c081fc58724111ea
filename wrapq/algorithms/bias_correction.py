"""Bias correction: the mean of what rounding does to a layer's output, taken off its bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv:1906.04721, section 4.2:
`E[y] - E[y~] = (W - W~) E[x]`. The empirical form, the paper's appendix D, takes both means from data, the float
model's and the quantized model's; a layer being linear, the difference is `W E[F] - W~ E[X]` for their inputs F and X.
"""

from __future__ import annotations

import math
from types import MappingProxyType

from pydantic import Field
from torch import Tensor

from wrapq.algorithms.base import ALGORITHMS, Correction, Corrector
from wrapq.registry import Options
from wrapq.statistics.input import InputStatistics


class BiasCorrectionOptions(Options):
    """Options of bias correction."""

    empirical: bool = Field(
        False, description="Make up for the mean error of the layer's input too; doubles the forwards."
    )


@ALGORITHMS.register("bias_correction")
class BiasCorrection(Corrector):
    """Adds to a layer's bias what its rounding takes from the mean of its output; a layer without bias gets one."""

    adds = "bias"
    Options = BiasCorrectionOptions
    options: BiasCorrectionOptions
    combines = MappingProxyType({"bias_shift": lambda parts: math.sqrt(sum(x * x for x in parts) / len(parts))})

    @property
    def needs(self) -> tuple[str, ...]:
        return ("mean", "mean_shift") if self.options.empirical else ("mean",)

    def correct(self, weight: Tensor, error: Tensor, where: str, statistics: InputStatistics) -> Correction:
        bias = error @ statistics.get("mean", where).float()
        if self.options.empirical:
            bias = bias + weight @ statistics.get("mean_shift", where).float()
        return Correction(bias=bias, report={"bias_shift": float(bias.square().mean().sqrt())})

    def added_elements(self, shape: tuple[int, int]) -> int:
        return shape[0]
