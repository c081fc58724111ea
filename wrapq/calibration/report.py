"""What a rounded weight lost."""

from __future__ import annotations

import torch
from torch import Tensor

from wrapq.calibration.algorithm import Rounded
from wrapq.calibration.statistics import InputStatistics, quadratic

SQNR_CEILING = 200.0  # dB; stands for "equal"


def rounding_report(weight: Tensor, rounded: Rounded, statistics: InputStatistics | None) -> dict[str, float]:
    """The error of a rounded weight [N, K]: its own, and with a Hessian H that of its output; H may be of each group of
    rows [G, K, K].

    `weight_sqnr_db` is `10 log10(|W|^2 / |D|^2)` for the difference D; `output_error` is `tr(D H D^T) / tr(W H W^T)`.
    """
    weight = weight.float()
    difference = rounded.qparams.dequantize(rounded.integers, torch.float32) - weight
    noise, signal = difference.square().sum(), weight.square().sum()
    sqnr = (10 * torch.log10(signal / noise)).clamp(-SQNR_CEILING, SQNR_CEILING).nan_to_num(0)
    report = {"weight_sqnr_db": float(sqnr)}
    if statistics is not None and "hessian" in statistics.sums:
        matrix = statistics.sums["hessian"].float()
        lost, there = (quadratic(rows, matrix).sum() for rows in (difference, weight))
        report |= {"output_error": float(lost / there) if there else 0.0, "rows": float(statistics.rows)}
    return report | dict(rounded.report)
