"""What the forward that is running knows of itself: one immutable record in one context variable.

Each greenlet has a context of its own, so that the forwards of many batches, run side by side, do not see each other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor


class CalibrationHooks(Protocol):
    """The forward of one batch, where a walk of calibration data runs it."""

    quantizes: bool
    """False lets every point that is quantized already pass its tensor on unchanged."""

    def on_activation(self, point: Any, x: Tensor) -> None:
        """The tensor of a static activation point, real tokens only, which is still open; may wait until it is not."""

    def on_weight_input(self, module: Any, raw: Tensor, x: Tensor) -> None:
        """The input of a wrapped module as it came, and quantized, as its weight, which is still open, multiplies it;
        may wait until the weight is rounded."""


@dataclass(frozen=True)
class ForwardContext:
    """What observers and quantization points need to know of the forward that calls them.

    Attributes:
        calibration: whom points report to; None lets a point observe whatever comes, as in a user's own loop.
        batch: the index of the batch that runs; None where what is computed belongs to no batch.
        padding: mask [B, T] of the batch's real tokens; None where every token is real.
        visible: while attention scores are observed, mask [B, T, S] of those that the attention mask does not hide.
        shared_bound: largest absolute element [1] of all weights that share one global scale; None for a weight alone.
    """

    calibration: CalibrationHooks | None = None
    batch: int | None = None
    padding: Tensor | None = None
    visible: Tensor | None = None
    shared_bound: Tensor | None = None


_CURRENT: ContextVar[ForwardContext] = ContextVar("forward_context", default=ForwardContext())  # noqa: B039 - frozen


def forward_context() -> ForwardContext:
    """The context of the forward that calls this."""
    return _CURRENT.get()


@contextmanager
def in_context(**changes: Any) -> Iterator[None]:
    """While this holds the context has `changes` of its attributes."""
    token = _CURRENT.set(replace(_CURRENT.get(), **changes))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def outside_batch() -> Any:
    """While this holds, what is made, such as a sum over all batches, belongs to none of them."""
    return in_context(batch=None)


def isolated() -> Any:
    """While this holds, a walk that is under way gathers nothing and nobody waits."""
    return in_context(calibration=None, batch=None)
