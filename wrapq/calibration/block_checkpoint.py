"""The state between two blocks, at which a walk can be put aside and taken up again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from wrapq.graph.blocks import input_hidden_states, replaced_forward
from wrapq.observers.forward_context import forward_context


@dataclass(frozen=True)
class BlockCheckpoint:
    """The state of a walk between two blocks: the `index` of the one that comes next, for each batch the `hidden`
    states [B, T, K] that enter it, as the blocks before left them, and whether the model's blocks return a tuple."""

    index: int
    hidden: Callable[[int], Tensor]
    as_tuple: bool


def skipped_blocks(layers: Sequence[nn.Module], checkpoint: BlockCheckpoint | None) -> AbstractContextManager[None]:
    """While this holds the blocks before `checkpoint` return at once, the last of them the hidden states kept there."""
    if checkpoint is None:
        return nullcontext()

    def skip(last: bool, *args: Any, **kwargs: Any) -> Any:
        hidden = checkpoint.hidden(cast(int, forward_context().batch)) if last else input_hidden_states(args, kwargs)
        return (hidden,) if checkpoint.as_tuple else hidden

    skipped = layers[: checkpoint.index]
    return replaced_forward({layer: partial(skip, layer is skipped[-1]) for layer in skipped})
