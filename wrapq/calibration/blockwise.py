"""Deciding all weights of a block at once, from what enters the block and what the float model leaves it with.

The forwards wait at the entry of the block until all of them are there, while the float model's runs of the same
batches go through it. The inputs and the targets of one block are held at a time, and always in memory.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from wrapq.calibration.algorithm import Rounded, Rounding
from wrapq.calibration.border import BATCH, batch_index
from wrapq.calibration.forward import Batch
from wrapq.calibration.lockstep import Stop
from wrapq.errors import CalibrationError
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.base import QuantModuleBase
from wrapq.wrappers.quantizer import PADDING, STREAM, Quantizer, real_tokens

BLOCK = "block"
"""What a block rounder needs."""


class BlockWeight(NamedTuple):
    """A weight that is to be rounded: float [N, K], and the spec of its grid."""

    matrix: Tensor
    spec: QuantSpec


class Visit(NamedTuple):
    """What one batch brings to the block, and the mask [B, T] of its real tokens."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mask: Tensor | None = None


class BlockProblem:
    """What a block rounder is given, in place of the model.

    What the stack decided before is in force within the block; dynamic activations are quantized, with a gradient
    straight through them, and static ones, whose ranges come later, are not.

    Attributes:
        weights: those to round, by the point's full name.
        batches: how many batches there are.
        seed: of any random choice, so that the same recipe makes the same ones.
    """

    def __init__(
        self,
        layer: nn.Module,
        modules: Mapping[str, tuple[QuantModuleBase, QuantSpec]],
        visits: Sequence[Visit],
        targets: Sequence[Tensor],
        seed: int,
    ) -> None:
        self.weights = {where: BlockWeight(m.float_matrix().float(), spec) for where, (m, spec) in modules.items()}
        self.batches, self.seed = len(visits), seed
        self._layer, self._visits, self._targets = layer, visits, targets
        self._modules = {where: module for where, (module, _) in modules.items()}
        names = {id(parameter): name for name, parameter in layer.named_parameters()}
        self._names = {where: names[id(module.float_weight())] for where, module in self._modules.items()}
        self._parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """The mean squared error of the block's output for a batch, over real tokens; differentiable.

        Args:
            batch: its number, from 0.
            weights: for each of `self.weights` the matrix [N, K] to compute with.
        """
        given = dict(self._parameters)
        for where, matrix in weights.items():
            module = self._modules[where]
            layout = module.float_weight()
            given[self._names[where]] = module.wrapper.from_matrix(matrix, layout.shape).to(layout.dtype)
        output = _alone(self._layer, self._visits[batch], given, quantizes=True)
        return (output.float() - self._targets[batch].float()).square().mean()


class BlockRounder(Rounding):
    """Chooses the codes of all weights of a block that are its to round."""

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Algorithm.needs`."""
        return (BLOCK,)

    @abstractmethod
    def round_block(self, problem: BlockProblem) -> dict[str, Rounded]:
        """The codes for each weight of `problem`, by the point's full name."""


@dataclass(eq=False)
class BlockStop:
    """The place, behind the border before a block, at which forwards wait until its weights are decided.

    Attributes:
        index: the block's.
        batches: how many batches there are; a float run has its batch's number and that many more.
        wait: how a forward waits; what it holds must stay in memory.
        decided: called with this.
        visits: what has come so far, by the number of the batch.
        targets: what the float model left the block with, likewise.
    """

    order: tuple[int, ...]
    index: int
    layer: nn.Module
    batches: int
    wait: Callable[[Stop], None]
    decided: Callable[[BlockStop], None]
    visits: dict[int, Visit] = field(default_factory=dict)
    targets: dict[int, Tensor] = field(default_factory=dict)
    passed: bool = False

    def hook(self) -> list[Any]:
        """Look at what enters and leaves the block; the handles that undo it."""
        return [
            self.layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.layer.register_forward_hook(self._leave),
        ]

    def decide(self) -> None:
        """See `Stop.decide`."""
        self.decided(self)
        self.passed = True
        self.visits.clear()
        self.targets.clear()

    def problem(self, modules: Mapping[str, tuple[QuantModuleBase, QuantSpec]]) -> BlockProblem:
        """The problem of rounding `modules`, by the weight's full name, each to a spec."""
        order = sorted(self.visits)
        visits, targets = [self.visits[i] for i in order], [self.targets[i] for i in order]
        return BlockProblem(self.layer, modules, visits, targets, torch.initial_seed() + self.index)

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.passed and BATCH.get() is not None and batch_index() < self.batches:
            self.visits[batch_index()] = Visit(args, kwargs, PADDING.get())
            self.wait(self)

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.passed and BATCH.get() is not None and batch_index() >= self.batches:
            self.targets[batch_index() - self.batches] = real_tokens(leaving(output).detach(), 1)


def visit_model(model: nn.Module, batches: Sequence[Batch], decided: Callable[[BlockStop], None]) -> None:
    """A model without repeated blocks is one: `decided` is called with all that enters and leaves it."""
    stop = BlockStop((-1, 0, 1), -1, model, len(batches), lambda stop: None, decided)
    for index, batch in enumerate(batches):
        stop.visits[index] = visit = Visit((), batch.inputs, batch.mask)
        stop.targets[index] = _alone(model, visit, {}, quantizes=False)
    stop.decide()


def check_blockwise(schedule: str, processes: int) -> None:
    """Raise `CalibrationError` where the weights of a block cannot be decided at once."""
    if schedule == "parallel":
        raise CalibrationError("rounding block by block looks at quantized blocks: use calibration.schedule=sequential")
    if processes > 1:
        raise CalibrationError("rounding block by block needs all calibration data in one process")


def leaving(output: Any) -> Tensor:
    """The hidden states among what a block returns: the first tensor of a tuple or of a model's output."""
    if isinstance(output, Mapping):
        return next(value for value in output.values() if isinstance(value, Tensor))
    return cast(Tensor, output if isinstance(output, Tensor) else output[0])


def _alone(layer: nn.Module, visit: Visit, parameters: Mapping[str, Tensor], quantizes: bool) -> Tensor:
    """What `layer` leaves a batch with, real tokens only, when run by itself with `parameters` in place of its own."""

    def run() -> Tensor:
        STREAM.set(_Deaf(quantizes))
        PADDING.set(visit.mask)
        return real_tokens(leaving(functional_call(layer, dict(parameters), visit.args, dict(visit.kwargs))), 1)

    return copy_context().run(run)


@dataclass
class _Deaf:
    """A stream of which nothing is gathered."""

    quantizes: bool

    def observe(self, point: Quantizer, x: Tensor) -> None:
        """See `Stream.observe`."""

    def meet(self, module: nn.Module, raw: Tensor, x: Tensor) -> None:
        """See `Stream.meet`."""
