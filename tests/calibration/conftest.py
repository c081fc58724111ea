"""What the tests of calibration share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from wrapq.algorithms.base import Rounder
from wrapq.algorithms.gptq import GPTQ
from wrapq.algorithms.ranges import Ranges
from wrapq.algorithms.rtn import RTN
from wrapq.calibration.assignments import Assignments
from wrapq.calibration.walker import Walker, WalkOptions
from wrapq.graph.blocks import Batch
from wrapq.wrappers.model import iter_quantizers, iter_wrapped
from wrapq.wrappers.quantizer import WeightQuantizer


def as_batches(tokens: Sequence[Tensor]) -> list[Batch]:
    return [Batch({"input_ids": ids, "use_cache": False}) for ids in tokens]


def gptq_walker(model: nn.Module, rounder: Rounder | None = None, **options: Any) -> Walker:
    """GPTQ, or `rounder`, for every weight that multiplies a matrix; rounding to nearest for the others; and the
    walk's `options`."""
    rounder = rounder or GPTQ()
    multiplying = {module.weight_quantizer for _, module in iter_wrapped(model) if module.wrapper.multiplies(module)}
    points = list(iter_quantizers(model))
    rounders = {q.where: rounder if q in multiplying else RTN() for q in points if isinstance(q, WeightQuantizer)}
    setters = {q.where: Ranges() for q in points if not isinstance(q, WeightQuantizer)}
    return Walker(model, Assignments(rounders, setters), WalkOptions(**options))


def decided(model: nn.Module) -> dict[str, str]:
    """What was decided for each static point, as a digest of its parameters and integers."""
    found = {}
    for quantizer in iter_quantizers(model):
        if not quantizer.spec.dynamic:
            integers = getattr(quantizer, "integers", None)
            found[quantizer.where] = quantizer.qparams.digest(), None if integers is None else integers.tolist()
    return found
