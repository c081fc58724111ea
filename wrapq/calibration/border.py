"""The border between two blocks: where a walk can be put aside and taken up again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

BATCH: ContextVar[int | None] = ContextVar("batch", default=None)
"""The index of the batch whose forward is running; None where what is computed belongs to no batch."""


@contextmanager
def made_for_all() -> Iterator[None]:
    """What is made while this holds, such as a sum over all batches, belongs to none of them."""
    token = BATCH.set(None)
    try:
        yield
    finally:
        BATCH.reset(token)


def batch_index() -> int:
    """The index of the batch whose forward is running."""
    return cast(int, BATCH.get())


@dataclass(frozen=True)
class Border:
    """What the blocks from `index` on need of those before.

    Attributes:
        index: the block that comes next.
        hidden: gives for each batch the hidden states [B, T, K] that enter it, as the blocks before left them.
        as_tuple: whether the model's blocks return a tuple.
    """

    index: int
    hidden: Callable[[int], Tensor]
    as_tuple: bool


@contextmanager
def skipping(layers: Sequence[nn.Module], border: Border | None) -> Iterator[None]:
    """Let the blocks before `border` return at once, the last of them the hidden states kept there."""
    skipped = list(layers[: border.index]) if border else []
    for position, layer in enumerate(skipped):
        # an attribute of the object hides the method of its class, and deleting it brings that back
        layer.__dict__["forward"] = _Stub(cast(Border, border), last=position == len(skipped) - 1)
    try:
        yield
    finally:
        for layer in skipped:
            layer.__dict__.pop("forward", None)


@dataclass(frozen=True)
class _Stub:
    border: Border
    last: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = entering(args, kwargs) if not self.last else self.border.hidden(batch_index())
        return (hidden,) if self.border.as_tuple else hidden


def entering(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a block: what is called so, or the first."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))
