"""The border between two blocks: where a walk can be put aside and taken up again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

BATCH: ContextVar[int] = ContextVar("batch")
"""The index of the batch whose forward is running."""


@dataclass(frozen=True)
class Border:
    """What the blocks from `index` on need of those before.

    Attributes:
        index: the block that comes next.
        hidden: for each batch the hidden states [B, T, K] that enter it, as the quantized blocks before left them.
        as_tuple: whether the model's blocks return a tuple.
    """

    index: int
    hidden: Sequence[Tensor]
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
        hidden = entering(args, kwargs) if not self.last else self.border.hidden[BATCH.get()]
        return (hidden,) if self.border.as_tuple else hidden


def entering(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a block: what is called so, or the first."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))
