"""The parts of a model that PT2E quantizes, calibrated once all points of wrapq's are finalized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from wrapq.errors import CalibrationError
from wrapq.graph.blocks import Batch
from wrapq.observers.forward_context import in_context
from wrapq.pt2e.base import GraphQuantizer
from wrapq.pt2e.part import GraphPart
from wrapq.wrappers.model import place_modules

PADDED = "padding would enter the ranges of what PT2E quantizes, whose observers know no mask"


@torch.no_grad()
def quantize_parts(
    model: nn.Module,
    quantizers: Mapping[str, GraphQuantizer],
    batches: Sequence[Batch],
    advance: Callable[[], None] = lambda: None,
) -> nn.Module:
    """Let PT2E quantize the modules that `quantizers` names, calibrated in one run of `batches` in which all points of
    the wrapped `model` quantize; after each batch `advance` is called. Returns the model, or its stand-in.

    Raises:
        CalibrationError: a part cannot be exported, a batch has padding.
        LifecycleError: no batch came to a part.
    """
    if not quantizers:
        return model
    if any(batch.mask is not None and not bool(batch.mask.all()) for batch in batches):
        raise CalibrationError(PADDED)
    parts = {name: GraphPart.of(model.get_submodule(name), each, name) for name, each in quantizers.items()}
    model = place_modules(model, parts)
    for batch in batches:
        with in_context(padding=batch.mask):
            model(**batch.inputs)
        advance()
    for part in parts.values():
        part.finish()
    return model
