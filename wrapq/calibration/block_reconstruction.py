"""Block reconstruction: all weights of a block are rounded together, so that its output stays near the float model's.

The calibration forwards wait at the entry of the block until all of them are there, while the float reference forwards
of the same batches go through it. The inputs and the targets of one block are held at a time, and always in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from wrapq.algorithms.base import BlockWeight
from wrapq.calibration.forwards import Unobserved
from wrapq.calibration.scheduler import Barrier, wait_for
from wrapq.graph.blocks import Batch, output_hidden_states
from wrapq.observers.forward_context import forward_context, in_context
from wrapq.wrappers.base import QuantModuleBase
from wrapq.wrappers.quantizer import real_tokens


class BlockInput(NamedTuple):
    """The arguments with which one batch enters the block, and the mask [B, T] of its real tokens."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mask: Tensor | None = None


class BlockReconstruction:
    """The problem that a block rounder is given (`wrapq.algorithms.base.BlockProblem`), in place of the model.
    What is finalized already is quantized within the block; dynamic activations are quantized, with a straight-through
    gradient, and static ones, whose ranges come later, are not."""

    def __init__(
        self,
        layer: nn.Module,
        modules: Mapping[str, QuantModuleBase],
        inputs: Sequence[BlockInput],
        targets: Sequence[Tensor],
        seed: int,
    ) -> None:
        self.weights = {
            where: BlockWeight(module.float_matrix().float(), module.point_quantizers()["weight"].spec)
            for where, module in modules.items()
        }
        self.batches, self.seed = len(inputs), seed
        self._layer, self._modules, self._inputs, self._targets = layer, modules, inputs, targets
        names = {id(parameter): name for name, parameter in layer.named_parameters()}
        self._names = {where: names[id(module.float_weight())] for where, module in modules.items()}
        self._parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        given = dict(self._parameters)
        for where, matrix in weights.items():
            module = self._modules[where]
            layout = module.float_weight()
            given[self._names[where]] = module.wrapper.from_matrix(matrix, layout.shape).to(layout.dtype)
        output = _run_alone(self._layer, self._inputs[batch], given, quantizes=True)
        return (output.float() - self._targets[batch].float()).square().mean()


class ReconstructionBarrier(Barrier):
    """The place, behind the entry of a block and before its points, at which calibration forwards wait until its
    weights are rounded by `round_weights`, which is called with this.

    Attributes:
        index, layer: the block.
        batches: how many batches there are; a float reference forward has its batch's number and that many more.
        inputs: what has come so far, by the number of the batch.
        targets: what the float model left the block with, likewise.
    """

    def __init__(
        self, index: int, layer: nn.Module, batches: int, round_weights: Callable[[ReconstructionBarrier], None]
    ) -> None:
        super().__init__((index, 0, 1), self._round)
        self.index, self.layer, self.batches, self.round_weights = index, layer, batches, round_weights
        self.inputs: dict[int, BlockInput] = {}
        self.targets: dict[int, Tensor] = {}

    def hook(self) -> list[RemovableHandle]:
        """Look at what enters and leaves the block; the handles that undo it."""
        return [
            self.layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.layer.register_forward_hook(self._leave),
        ]

    def problem(self, modules: Mapping[str, QuantModuleBase]) -> BlockReconstruction:
        """The problem of rounding the weights of `modules`, by the weight's full name."""
        order = sorted(self.inputs)
        inputs, targets = [self.inputs[i] for i in order], [self.targets[i] for i in order]
        return BlockReconstruction(self.layer, modules, inputs, targets, torch.initial_seed() + self.index)

    def _round(self) -> None:
        self.round_weights(self)
        self.inputs.clear()
        self.targets.clear()

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = forward_context()
        if not self.passed and context.batch is not None and context.batch < self.batches:
            self.inputs[context.batch] = BlockInput(args, kwargs, context.padding)
            wait_for(self)  # what it holds stays in memory

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        batch = forward_context().batch
        if not self.passed and batch is not None and batch >= self.batches:
            self.targets[batch - self.batches] = real_tokens(output_hidden_states(output).detach(), 1)


def reconstruct_model(
    model: nn.Module, batches: Sequence[Batch], round_weights: Callable[[ReconstructionBarrier], None]
) -> None:
    """Take a model without repeated blocks as one block: `round_weights` is called with its inputs and outputs."""
    barrier = ReconstructionBarrier(-1, model, len(batches), round_weights)
    for index, batch in enumerate(batches):
        barrier.inputs[index] = BlockInput((), batch.inputs, batch.mask)
        barrier.targets[index] = _run_alone(model, barrier.inputs[index], {}, quantizes=False)
    barrier.open()


def _run_alone(layer: nn.Module, given: BlockInput, parameters: Mapping[str, Tensor], quantizes: bool) -> Tensor:
    """The output of `layer` for a batch, real tokens only, run by itself with `parameters` in place of its own."""
    with in_context(calibration=Unobserved(quantizes), padding=given.mask):
        output = functional_call(layer, dict(parameters), given.args, dict(given.kwargs))
        return real_tokens(output_hidden_states(output), 1)
