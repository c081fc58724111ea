"""What formats have in common that start from a program of `torch.export`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from wrapq.errors import ModelError, PlanError, Problem, first_line
from wrapq.export.base import Exporter, Folder, Reading, Refusals
from wrapq.export.lowering import inexpressible
from wrapq.export.nearest import remedy_for
from wrapq.export.reload import Answer, ask, read
from wrapq.export.stopwatch import INPUT, LOGITS
from wrapq.graph.mixtures import EXPERT_NAME
from wrapq.quant.spec import QuantSpec
from wrapq.resolve.plan import ModulePlan, Plan

_SAME, _STEP, _COARSE_STEP = 1e-3, 5e-2, 0.25
"""Weights alone; and activations, where a number between two steps may fall to either side, as the operators multiply
by the reciprocal of a scale; with fewer than 8 bits, or two in a float's mantissa, each such step is large."""
OPEN = torch.export.Dim.DYNAMIC
"""An axis whose size a program leaves open."""


@dataclass(frozen=True)
class Example:
    """The call of a module by which it is traced where it is no language model, whose calls are known.

    Attributes:
        inputs: the tensors among its arguments, by name, in the order in which the program takes them.
        others: arguments that stay what they are.
    """

    inputs: Mapping[str, Tensor]
    others: Mapping[str, Any]

    def in_float32(self) -> Example:
        """The same call of a module that computes in float32."""
        wide = {name: each.float() if each.is_floating_point() else each for name, each in self.inputs.items()}
        return replace(self, inputs=wide)

    def function(self, model: nn.Module) -> nn.Module:
        """The `model` as a function of the inputs, in order."""
        return InOrder(model, [*self.inputs], self.others)

    def traced(self, model: nn.Module, whole: bool = False, strict: bool = False) -> Any:
        """The program of `model`. The first axis of an input stays open, and each axis of integers, which stand for
        words, where the model takes other sizes too; none where `whole`."""
        sizes = [None if whole else _open_axes(tensor) for tensor in self.inputs.values()]
        return traced(self.function(model), {}, {"inputs": tuple(sizes)}, strict, tuple(self.inputs.values()))


class InOrder(nn.Module):
    """A module as a function of its tensors in order; its results are the tensors in what it returns, in order."""

    def __init__(self, model: nn.Module, names: Sequence[str], others: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.others = model, names, others
        self.training = False

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        done = self.model(**dict(zip(self.names, inputs, strict=True)), **self.others)
        return tuple(leaf for leaf in tree_leaves(done) if isinstance(leaf, Tensor))


def _open_axes(tensor: Tensor) -> dict[int, Any]:
    return dict.fromkeys(range(1 if tensor.is_floating_point() else tensor.dim()), torch.export.Dim.AUTO)


class ProgramExporter(Exporter, ABC):
    """An exporter of what `wrapq.export.lowering` makes of a model.

    Attributes:
        runtime: what runs the export, and the script that lets it; see `wrapq.export.reload`.
    """

    runtime: ClassVar[tuple[str, str]]
    takes_parts: ClassVar[bool] = True
    in_float32: ClassVar[bool] = False
    """Whether what it writes takes and gives float32 whatever the module computes in."""

    @abstractmethod
    def write(self, model: nn.Module, folder: Folder) -> None:
        """Write the export of the converted language `model`, which the plan's check allows."""

    @abstractmethod
    def write_module(self, model: nn.Module, example: Example, folder: Folder) -> None:
        """Write the export of any converted module, of which `refusals` refuses nothing."""

    def export(self, model: nn.Module, plan: Plan, folder: Folder) -> None:
        if problems := list(self.check(plan)):
            raise PlanError(problems)
        self.write(model, folder)

    def read(self, folder: Path, ids: Tensor, device: str) -> Reading:
        return run_script(*self.runtime, folder, ids, device)

    def read_outputs(self, folder: Path, inputs: Sequence[Tensor], device: str) -> Answer:
        """The outputs of what `write_module` wrote, in order, and `latency_ms` and `peak_mb`; see `Exporter.read`."""
        given = {f"{INPUT}{i}": each for i, each in enumerate(inputs)}
        return _answered(self.runtime[0], ask(folder, given, device, self.runtime[1]))

    def inexpressible(self, spec: QuantSpec, weight: bool) -> str | None:
        """As `wrapq.export.lowering.inexpressible`, in this format."""
        return inexpressible(spec, weight)

    def refusals(self, modules: Iterable[ModulePlan]) -> Refusals:
        """What of `modules` the format cannot say."""
        refusals = Refusals()
        for module in modules:
            for point in module.points:
                spec, weight = point.quant_spec, point.role == "weight"
                if reason := self.inexpressible(spec, weight):
                    remedy = remedy_for(spec, weight, partial(self._says, weight))
                    refusals.refuse(module, f"{point.name} in {spec}: {reason}", remedy)
            if EXPERT_NAME.fullmatch(module.name):
                what = "which tokens come to an expert depends on the data, which torch.export does not follow"
                refusals.refuse(module, what, "run with export=none, or export=compressed_tensors")
        return refusals

    def check(self, plan: Plan) -> Iterable[Problem]:
        refusals = self.refusals(plan.modules)
        if plan.recipe.float_prefix:
            what = "no operator says that first tokens stay float"
            refusals.refused["", what, "run with float_prefix=0, or with export=none"] = ["float_prefix"]
        yield from refusals.problems
        yield from self.missing_packages()

    def _says(self, weight: bool, spec: QuantSpec) -> bool:
        return self.inexpressible(spec, weight) is None

    def tolerance(self, plan: Plan) -> float:
        return self.rounding(plan.modules, plan.model.dtype)

    def rounding(self, modules: Iterable[ModulePlan], dtype: str) -> float:
        """As `tolerance`, where `modules` are quantized and the model computes in `dtype`."""
        specs = [p.quant_spec for module in modules for p in module.points if p.role == "activation"]
        if not specs:
            return _SAME if dtype == "float32" else _STEP
        coarse = any(spec.dtype.bits < 8 or spec.dtype.name == "fp8_e5m2" for spec in specs)
        return _COARSE_STEP if coarse else _STEP


def run_script(name: str, script: str, folder: Path, ids: Tensor, device: str) -> Reading:
    """What the runtime called `name` computes of the export in `folder`, by a script; see `Exporter.read`."""
    answer = _answered(name, read(folder, ids, device, script))
    return Reading(answer.logits[LOGITS], answer.measured, answer.tokens)


def _answered(name: str, answer: Answer) -> Answer:
    if not answer.logits:
        raise ModelError(f"{name} does not run the export: {answer.reason}")
    return answer


def traced(
    function: nn.Module,
    given: Mapping[str, Any],
    open_axes: Mapping[str, Any],
    strict: bool = False,
    inputs: tuple[Tensor, ...] = (),
) -> Any:
    """The program of `function`, called with `inputs` and the keywords `given`; `ModelError` where torch.export does
    not take it."""
    try:
        with torch.no_grad():
            return torch.export.export(function, inputs, dict(given), dynamic_shapes=dict(open_axes), strict=strict)
    except Exception as error:  # of what the tracer met in somebody else's code, there is no list
        raise ModelError(f"torch.export does not take this model: {first_line(error)}") from error


def example_ids(model: nn.Module, batch: int, length: int) -> Tensor:
    """Token ids [B, T] to trace a language model with."""
    first = next(chain(model.parameters(), model.buffers()))  # all quantized, it may have no parameter left
    return torch.arange(batch * length, device=first.device).view(batch, length)
