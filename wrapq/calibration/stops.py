"""The places at which the forwards of a walk wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor, nn

from wrapq.calibration.border import BATCH, batch_index, entering
from wrapq.calibration.lockstep import Stop
from wrapq.wrappers.quantizer import Quantizer


@dataclass(eq=False)
class OpenPoint:
    """A point that is open: an activation without range, or a weight whose rounder waits for data."""

    order: tuple[int, ...]
    quantizer: Quantizer
    decided: Callable[[Quantizer], None]

    def decide(self) -> None:
        """See `Stop.decide`."""
        self.decided(self.quantizer)


@dataclass(eq=False)
class Gate:
    """The border before a block, at which the forwards wait until all have left the block before.

    Attributes:
        index: the block's.
        wait: how a forward waits.
        entered: called for each batch with the block's index, the batch's, and the hidden states that enter.
        opened: called with the block's index before the forwards go on.
    """

    order: tuple[int, ...]
    index: int
    wait: Callable[[Stop], None]
    entered: Callable[[int, int, Tensor], None]
    opened: Callable[[int], None]
    passed: bool = False

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the block."""
        if not self.passed and BATCH.get() is not None:
            self.entered(self.index, batch_index(), entering(args, kwargs))
            self.wait(self)

    def decide(self) -> None:
        """See `Stop.decide`."""
        self.opened(self.index)
        self.passed = True


@dataclass(eq=False)
class Once:
    """A module that may run only once in a forward, because what it shows is used before it could run again."""

    again: Callable[[], NoReturn]
    batches: set[int] = field(default_factory=set)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the module; calls `again`, which raises, when it runs a second time."""
        if BATCH.get() is None:  # the block is run by itself, and nothing is gathered
            return
        if batch_index() in self.batches:
            self.again()
        self.batches.add(batch_index())
