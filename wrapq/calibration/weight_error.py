"""The error of a rounded weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wrapq.algorithms.base import Rounded
from wrapq.metrics import SQNR_CEILING
from wrapq.statistics.input import InputStatistics, quadratic

_PIECE = 1 << 24  # elements that are compared at once


def error_report(weight: Tensor, rounded: Rounded, statistics: InputStatistics | None) -> dict[str, float]:
    """The error of a rounded weight W [N, K], which is off by D: `weight_sqnr_db` is `10 log10(|W|^2 / |D|^2)`, and
    with a Hessian H, or one for each group of rows [G, K, K], `output_error` is `tr(D H D^T) / tr(W H W^T)`."""
    held = None if statistics is None else statistics.sums.get("hessian")
    hessian = None if held is None else held.float()
    noise = signal = lost = power = torch.zeros((), device=weight.device)
    for original, difference in _parts(weight, rounded, whole=hessian is not None and hessian.dim() > 2):
        noise, signal = noise + difference.square().sum(), signal + original.square().sum()
        if hessian is not None:
            lost = lost + quadratic(difference, hessian).sum()
            power = power + quadratic(original, hessian).sum()
    sqnr = (10 * torch.log10(signal / noise)).clamp(-SQNR_CEILING, SQNR_CEILING).nan_to_num(0)
    report = {"weight_sqnr_db": float(sqnr)}
    if statistics is not None and hessian is not None:
        report |= {"output_error": float(lost / power) if power else 0.0, "rows": float(statistics.rows)}
    return report


def _parts(weight: Tensor, rounded: Rounded, whole: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the weight, float32 [n, K], and how far they are off."""
    qparams, count = rounded.qparams, len(weight)
    rows = max(1, _PIECE * count // weight.numel())
    if whole or rows >= count or qparams.spec.granularity == "block":
        original = weight.float()
        yield original, qparams.dequantize(rounded.integers, torch.float32).sub_(original)
        return
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        both = {"scale": qparams.scale, "zero_point": qparams.zero_point}
        by_row: dict[str, Any] = {
            name: t[part] for name, t in both.items() if t is not None and t.dim() > 1 and len(t) == count
        }
        original = weight[part].float()
        yield original, replace(qparams, **by_row).dequantize(rounded.integers[part], torch.float32).sub_(original)
