"""The head of a language model at the end of a walk: its logits are observed a part of the positions at a time.

Of a large vocabulary the logits of one batch take more memory than the model, and every batch would hold its own while
it waits for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from wrapq.calibration.forwards import BatchForward, CalibrationForward, EndOfForward
from wrapq.graph.blocks import output_head
from wrapq.graph.head import ELEMENTS
from wrapq.observers.forward_context import forward_context
from wrapq.runtime.prefix import current_prefix
from wrapq.runtime.stand_in import original_class
from wrapq.wrappers.base import QuantModuleBase
from wrapq.wrappers.quantizer import Quantizer, State, real_tokens

_ELEMENTS = ELEMENTS // 4
"""Logits that are observed at once: a histogram takes several times their memory."""


def observed_in_parts(model: nn.Module, waiting: Sequence[Quantizer]) -> dict[nn.Module, Callable[..., Any]]:
    """What the head of a wrapped language model runs as its forward meanwhile, where its logits are the last that is
    observed: of the points `waiting` for data, which come in the model's order, none comes after its output. Nothing
    for any other model."""
    head, last = output_head(model), next(reversed(waiting), None)
    if not isinstance(head, QuantModuleBase) or original_class(head) is not nn.Linear or last is None:
        return {}
    fits = last is head.point_quantizers().get("output") and last.spec.granularity != "head"
    fits = fits and last.observer is not None and last.observer.in_parts
    return {head: partial(_observe, head, last)} if fits else {}


def _observe(head: Any, point: Quantizer, x: Tensor) -> Tensor:
    """The forward of the `head` for `x` [B, T, K]; ends the batch's forward where it observes many logits."""
    calibration, rows = forward_context().calibration, _ELEMENTS // head.out_features
    many = x.dim() == 3 and x.shape[:2].numel() > rows
    if not many or not isinstance(calibration, BatchForward) or point.state is not State.OBSERVING or current_prefix():
        return type(head).forward(head, x)
    met = head.on_weight_input(x, head.q("input", x))
    if isinstance(calibration, CalibrationForward):
        real = real_tokens(met.detach(), 1)
        weight, bias = head.weight, head.bias
        for part in real.reshape(1, -1, met.shape[-1]).split(max(1, rows), 1):
            part = part if real.dim() == 3 else part[0]
            calibration.observe(point, head.repaired(part, linear(part, weight, bias)))
        if calibration.quantizes:
            calibration.walk.wait_at(point)
    raise EndOfForward
