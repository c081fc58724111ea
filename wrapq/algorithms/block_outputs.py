"""The output error of a block of the float model when some of its weights are replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from wrapq.errors import CalibrationError
from wrapq.graph.blocks import Batch, find_blocks, output_hidden_states
from wrapq.graph.rewriter import GraphRewriter
from wrapq.observers.forward_context import in_context, isolated
from wrapq.wrappers.quantizer import real_tokens


class BlockOutputs:
    """The outputs of a block for the first calibration batch, with the float weights and with others.

    The block is that in which all `modules` lie, whose weights will be replaced, or else the whole model of `rewriter`.
    Raises `CalibrationError` where it has no data to run.
    """

    def __init__(self, rewriter: GraphRewriter, modules: Sequence[str]) -> None:
        if not rewriter.batches:
            raise CalibrationError("the model is run again on calibration data, and there is none")
        blocks = find_blocks(rewriter.model)
        within = {blocks.index(name) for name in modules}
        index = within.pop() if len(within) == 1 else None
        self.name = "" if index is None else blocks.names()[index]
        self.part = rewriter.model.get_submodule(self.name)
        batch = rewriter.batches[0]
        self._inputs = _arguments(rewriter.model, self.part, batch) if self.name else ((), batch.inputs)
        self._mask = batch.mask
        self._output = self._run({})

    def error(self, weights: Mapping[str, Tensor]) -> float:
        """The squared error of the output with `weights`, by their full names, summed over all elements."""
        own = {name.removeprefix(f"{self.name}."): weight for name, weight in weights.items()}
        return float((self._run(own) - self._output).double().square().sum())

    @torch.no_grad()
    def _run(self, weights: Mapping[str, Tensor]) -> Tensor:
        args, kwargs = self._inputs
        with isolated(), in_context(padding=self._mask):
            return real_tokens(output_hidden_states(functional_call(self.part, dict(weights), args, dict(kwargs))), 1)


class _BlockReachedError(Exception):
    """The forward reached the block, and need not go on."""


@torch.no_grad()
def _arguments(model: nn.Module, part: nn.Module, batch: Batch) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    arguments: list[Any] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments.append((args, kwargs))
        raise _BlockReachedError

    hook = part.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    try:
        with isolated():
            model(**batch.inputs)
    except _BlockReachedError:
        return arguments[0]
    finally:
        hook.remove()
    raise CalibrationError(f"no token of the first batch comes to {type(part).__name__}")
