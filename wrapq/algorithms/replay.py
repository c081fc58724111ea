"""Running a part of the float model again with other weights, to see what they do to its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from wrapq.calibration.blocks import find_blocks
from wrapq.calibration.blockwise import leaving
from wrapq.calibration.border import BATCH
from wrapq.calibration.forward import Batch
from wrapq.calibration.surgery import Surgeon
from wrapq.errors import CalibrationError
from wrapq.wrappers.quantizer import PADDING, STREAM, real_tokens


class Replay:
    """The block in which modules lie, the whole model where they lie in none or several, and what it does to the first
    batch of calibration data.

    Args:
        surgeon: with the float model and the data.
        modules: whose weights will be replaced.

    Raises:
        CalibrationError: there is no data to run.
    """

    def __init__(self, surgeon: Surgeon, modules: Sequence[str]) -> None:
        if not surgeon.batches:
            raise CalibrationError("the model is run again on calibration data, and there is none")
        blocks = find_blocks(surgeon.model)
        within = {blocks.index(name) for name in modules}
        index = within.pop() if len(within) == 1 else None
        self.name = "" if index is None else blocks.names()[index]
        self.part = surgeon.model.get_submodule(self.name)
        batch = surgeon.batches[0]
        self._inputs = _entering(surgeon.model, self.part, batch) if self.name else ((), batch.inputs)
        self._mask = batch.mask
        self._output = self._run({})

    def error(self, weights: Mapping[str, Tensor]) -> float:
        """The squared error of the output with `weights`, by their full names, summed over all elements."""
        start = len(self.name) + 1 if self.name else 0
        own = {name[start:]: weight for name, weight in weights.items()}
        return float((self._run(own) - self._output).double().square().sum())

    @torch.no_grad()
    def _run(self, weights: Mapping[str, Tensor]) -> Tensor:
        args, kwargs = self._inputs

        def run() -> Tensor:
            PADDING.set(self._mask)
            return real_tokens(leaving(functional_call(self.part, dict(weights), args, dict(kwargs))), 1)

        return _apart(run)


class _EnteredError(Exception):
    """The forward came to the part, and need not go on."""


@torch.no_grad()
def _entering(model: nn.Module, part: nn.Module, batch: Batch) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments with which a forward of `model` comes to `part`."""
    found: list[Any] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _EnteredError

    hook = part.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    try:
        _apart(lambda: model(**batch.inputs))
    except _EnteredError:
        return found[0]
    finally:
        hook.remove()
    raise CalibrationError(f"no token of the first batch comes to {type(part).__name__}")


def _apart(run: Any) -> Any:
    """What `run` returns, of which a walk that is under way gathers nothing and for which nobody waits."""

    def alone() -> Any:
        STREAM.set(None)
        BATCH.set(None)
        return run()

    return copy_context().run(alone)
