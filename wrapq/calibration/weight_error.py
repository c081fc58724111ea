"""The error of a rounded weight."""

from __future__ import annotations

import torch
from torch import Tensor

from wrapq.algorithms.base import Rounded
from wrapq.metrics import SQNR_CEILING
from wrapq.statistics.input import InputStatistics, quadratic


def error_report(weight: Tensor, rounded: Rounded, statistics: InputStatistics | None) -> dict[str, float]:
    """The error of a rounded weight W [N, K], which is off by D: `weight_sqnr_db` is `10 log10(|W|^2 / |D|^2)`, and
    with a Hessian H, or one for each group of rows [G, K, K], `output_error` is `tr(D H D^T) / tr(W H W^T)`."""
    weight = weight.float()
    difference = rounded.qparams.dequantize(rounded.integers, torch.float32) - weight
    noise, signal = difference.square().sum(), weight.square().sum()
    sqnr = (10 * torch.log10(signal / noise)).clamp(-SQNR_CEILING, SQNR_CEILING).nan_to_num(0)
    report = {"weight_sqnr_db": float(sqnr)}
    if statistics is not None and "hessian" in statistics.sums:
        hessian = statistics.sums["hessian"].float()
        lost, power = (quadratic(matrix, hessian).sum() for matrix in (difference, weight))
        report |= {"output_error": float(lost / power) if power else 0.0, "rows": float(statistics.rows)}
    return report
