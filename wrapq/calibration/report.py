"""What a rounded weight lost."""

from __future__ import annotations

from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from wrapq.calibration.algorithm import Rounded
from wrapq.calibration.statistics import InputStatistics, quadratic

SQNR_CEILING = 200.0  # dB; stands for "equal"


class Reporter:
    """What a weight [N, K] loses by being rounded, once or to several specs.

    Args:
        weight: the weight.
        statistics: of its input; H may be of each group of rows [G, K, K].
    """

    def __init__(self, weight: Tensor, statistics: InputStatistics | None) -> None:
        self._weight = weight
        self._input = statistics if statistics is not None and "hessian" in statistics.sums else None

    @cached_property
    def _there(self) -> Tensor:
        """`tr(W H W^T)`, the same whatever it is rounded to."""
        return self._of_output(self._weight.float())

    def _of_output(self, rows: Tensor) -> Tensor:
        return quadratic(rows, cast(InputStatistics, self._input).sums["hessian"].float()).sum()

    def report(self, rounded: Rounded) -> dict[str, float]:
        """The error of the weight: its own, and with a Hessian H that of its output.

        `weight_sqnr_db` is `10 log10(|W|^2 / |D|^2)` for the difference D; `output_error` is `tr(D H D^T) /
        tr(W H W^T)`.
        """
        weight = self._weight.float()
        difference = rounded.qparams.dequantize(rounded.integers, torch.float32) - weight
        noise, signal = difference.square().sum(), weight.square().sum()
        sqnr = (10 * torch.log10(signal / noise)).clamp(-SQNR_CEILING, SQNR_CEILING).nan_to_num(0)
        report = {"weight_sqnr_db": float(sqnr)}
        if self._input is not None:
            error = float(self._of_output(difference) / self._there) if self._there else 0.0
            report |= {"output_error": error, "rows": float(self._input.rows)}
        return report | dict(rounded.report)
