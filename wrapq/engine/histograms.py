"""What the values of a quantized model look like: compact histograms, and the magnitude of every activation."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from wrapq.calibration.walker import Walker
from wrapq.wrappers.quantizer import WeightQuantizer

BINS = 33  # odd, so that zero has a bin of its own
MOST = 1 << 20  # elements of a weight that are counted


def value_histograms(walker: Walker, weights: bool = True) -> dict[str, dict[str, Any]]:
    """For each rounded weight of a model its histogram, for each static activation what calibration saw.

    Args:
        walker: after its run, its model not converted yet.
        weights: False where the weights are not in memory.
    """
    rounded = [q for q in walker.points() if isinstance(q, WeightQuantizer) and q.integers is not None]
    histograms = {quantizer.where: _of_weight(quantizer) for quantizer in rounded} if weights else {}
    return {"weights": histograms, "activations": _of_activations(walker.statistics)}


def absmax_curves(walker: Walker) -> dict[str, list[float]]:
    """For each activation of a block, such as `mlp.down_proj.input`, its largest magnitude over the blocks."""
    curves: dict[str, list[float]] = {}
    for where, facts in _of_activations(walker.statistics).items():
        if walker.blocks.index(where) is not None:
            name = where.removeprefix(walker.blocks.prefix).split(".", 2)[2]
            curves.setdefault(f"activation_absmax/{name}", []).append(facts["absmax"])
    return curves


def _of_weight(quantizer: WeightQuantizer) -> dict[str, Any]:
    """A histogram from minus to plus the largest magnitude, of every n-th element where there are very many."""
    kept = quantizer.dequantized  # from the measurement just made; else made here, and not kept
    matrix = quantizer.qparams.dequantize(cast(Tensor, quantizer.integers), torch.float32) if kept is None else kept
    values = matrix.flatten()
    absmax = float(values.abs().max()) if values.numel() else 0.0
    values = values[:: 1 + values.numel() // MOST]
    return {"absmax": absmax, "counts": histogram(values, absmax)}


def histogram(values: Tensor, absmax: float) -> list[int]:
    """How many of `values` lie in each of 33 equal bins from `-absmax` to `absmax`."""
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
