"""Compact histograms of the values of a quantized model, and the magnitude of every activation."""

from __future__ import annotations

from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from wrapq.calibration.walker import Walker
from wrapq.quant.affine import row_parts
from wrapq.wrappers.quantizer import WeightQuantizer

BINS = 33  # odd, so that zero has a bin of its own
MOST = 1 << 20  # elements of a weight that are counted

_CURVES = {"weight_sqnr_db": "weight_sqnr_db", "output_error": "output_error", "absmax": "activation_absmax"}
"""The figures of points that are tracked over the blocks, and how their curves are called."""


def value_histograms(walker: Walker, weights: bool = True) -> dict[str, dict[str, Any]]:
    """For each rounded weight of a calibrated model, unless `weights` is False, its histogram; for each static
    activation what calibration saw."""
    rounded = [q for q in walker.points() if isinstance(q, WeightQuantizer) and q.integers is not None]
    dtype = next((p.dtype for p in walker.model.parameters() if p.is_floating_point()), torch.float32)
    histograms = {quantizer.where: _of_weight(quantizer, dtype) for quantizer in rounded} if weights else {}
    return {"weights": histograms, "activations": _of_activations(walker.result.statistics)}


def block_curves(walker: Walker) -> dict[str, list[float]]:
    """Over the blocks the figures of each weight, such as `mlp.down_proj`, and each activation, as of its `.input`."""
    curves: dict[str, list[float]] = {}
    for where, figures in chain(walker.result.reports.items(), _of_activations(walker.result.statistics).items()):
        if walker.blocks.index(where) is not None:
            name = where.removeprefix(walker.blocks.prefix).split(".", 2)[2].removesuffix(".weight")
            for figure, curve in _CURVES.items():
                if figure in figures:
                    curves.setdefault(f"{curve}/{name}", []).append(figures[figure])
    return curves


def _of_weight(quantizer: WeightQuantizer, dtype: torch.dtype) -> dict[str, Any]:
    """A histogram from minus to plus the largest magnitude, of every n-th element where there are very many."""
    codes, absmax, some = cast(Tensor, quantizer.integers), 0.0, [torch.empty(0)]
    step, skipped, rows = 1 + codes.numel() // MOST, 0, torch.arange(len(codes), device=codes.device)
    for part in row_parts(codes):
        values = quantizer.rows(rows[part], dtype).flatten()
        absmax = max(absmax, float(values.abs().max()) if values.numel() else 0.0)
        some.append(values[skipped::step].float().cpu())
        skipped = (skipped - values.numel()) % step
    return {"absmax": absmax, "counts": histogram(torch.cat(some), absmax)}


def histogram(values: Tensor, absmax: float) -> list[int]:
    """The count of `values` in each of 33 equal bins from `-absmax` to `absmax`."""
    limit = absmax or 1.0
    return torch.histc(values.float().cpu(), BINS, -limit, limit).long().tolist()


def _of_activations(statistics: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, tensor in statistics.items():
        where, _, part = key.rpartition(".")
        if part in ("low", "high"):
            facts = found.setdefault(where, {"absmax": 0.0})
            facts[part] = float(tensor.min() if part == "low" else tensor.max())
            facts["absmax"] = max(facts["absmax"], float(tensor.abs().max()))
    return found
