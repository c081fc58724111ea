"""What formats have in common that start from a program of `torch.export`."""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wrapq.errors import ModelError, PlanError, Problem
from wrapq.export.base import Exporter, Folder, Reading, Refusals
from wrapq.export.lowering import inexpressible
from wrapq.export.nearest import remedy_for
from wrapq.export.reload import read
from wrapq.export.stopwatch import LOGITS
from wrapq.graph.mixtures import EXPERT_NAME
from wrapq.quant.spec import QuantSpec
from wrapq.resolve.plan import Plan

_SAME, _STEP, _COARSE_STEP = 1e-3, 5e-2, 0.25
"""Weights alone; and activations, where a number between two steps may fall to either side, as the operators multiply
by the reciprocal of a scale; with fewer than 8 bits each such step is large."""
OPEN = torch.export.Dim.DYNAMIC
"""An axis whose size a program leaves open."""


class ProgramExporter(Exporter, ABC):
    """An exporter of what `wrapq.export.lowering` makes of a model.

    Attributes:
        runtime: what runs the export, and the script that lets it; see `wrapq.export.reload`.
    """

    runtime: ClassVar[tuple[str, str]]

    @abstractmethod
    def write(self, model: nn.Module, folder: Folder) -> None:
        """Write the export of the converted `model`, which the plan's check allows."""

    def export(self, model: nn.Module, plan: Plan, folder: Folder) -> None:
        if problems := list(self.check(plan)):
            raise PlanError(problems)
        self.write(model, folder)

    def read(self, folder: Path, ids: Tensor, device: str) -> Reading:
        return run_script(*self.runtime, folder, ids, device)

    def inexpressible(self, spec: QuantSpec, weight: bool) -> str | None:
        """As `wrapq.export.lowering.inexpressible`, in this format."""
        return inexpressible(spec, weight)

    def check(self, plan: Plan) -> Iterable[Problem]:
        refusals = Refusals()
        for module in plan.modules:
            for point in module.points:
                spec, weight = point.quant_spec, point.role == "weight"
                if reason := self.inexpressible(spec, weight):
                    remedy = remedy_for(spec, weight, partial(self._says, weight))
                    refusals.refuse(module, f"{point.name} in {spec}: {reason}", remedy)
            if EXPERT_NAME.fullmatch(module.name):
                what = "which tokens come to an expert depends on the data, which torch.export does not follow"
                refusals.refuse(module, what, "run with export=none, or export=compressed_tensors")
        if plan.recipe.float_prefix:
            what = "no operator says that first tokens stay float"
            refusals.refused["", what, "run with float_prefix=0, or with export=none"] = ["float_prefix"]
        yield from refusals.problems
        yield from self.missing_packages()

    def _says(self, weight: bool, spec: QuantSpec) -> bool:
        return self.inexpressible(spec, weight) is None

    def tolerance(self, plan: Plan) -> float:
        specs = [p.quant_spec for module in plan.modules for p in module.points if p.role == "activation"]
        if not specs:
            return _SAME if plan.model.dtype == "float32" else _STEP
        return _STEP if all(spec.dtype.bits >= 8 for spec in specs) else _COARSE_STEP


def run_script(name: str, script: str, folder: Path, ids: Tensor, device: str) -> Reading:
    """What the runtime called `name` computes of the export in `folder`, by a script; see `Exporter.read`."""
    answer = read(folder, ids, device, script)
    if not answer.logits:
        raise ModelError(f"{name} does not run the export: {answer.reason}")
    return Reading(answer.logits[LOGITS], answer.measured, answer.tokens)


def traced(function: nn.Module, given: Mapping[str, Any], open_axes: Mapping[str, Any], strict: bool = False) -> Any:
    """The program of `function`, called with the keywords `given`; `ModelError` where torch.export does not take it."""
    try:
        with torch.no_grad():
            return torch.export.export(function, (), dict(given), dynamic_shapes=dict(open_axes), strict=strict)
    except Exception as error:  # of what the tracer met in somebody else's code, there is no list
        raise ModelError(f"torch.export does not take this model: {first_line(error)}") from error


def example_ids(model: nn.Module, batch: int, length: int) -> Tensor:
    """Token ids [B, T] to trace a language model with."""
    return torch.arange(batch * length, device=next(model.parameters()).device).view(batch, length)


@contextmanager
def quiet(*loud: str) -> Iterator[None]:
    """Without the warnings of a converter, of its loggers `loud` among others; none that it imports sets up how this
    process logs, which `logging.basicConfig` does where there is no handler."""
    root, handler = logging.getLogger(), logging.NullHandler()
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in loud}
    root.addHandler(handler)
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(handler)
        for logger, level in loggers.items():
            logger.setLevel(level)


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
