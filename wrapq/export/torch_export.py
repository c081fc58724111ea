"""A program of `torch.export`: the graph of the model in standard operators, with its integers, in one file.

`torch.export.load` reads it wherever torch is, without transformers and without wrapq; AOTInductor, ExecuTorch and
other compilers take it from there.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from wrapq.errors import ModelError, PlanError, Problem
from wrapq.export import run_program
from wrapq.export.base import EXPORTERS, Exporter, Folder, Reading, Refusals
from wrapq.export.lowering import NEEDED, inexpressible, lower
from wrapq.export.reload import read
from wrapq.export.run_program import LOGITS, PROGRAM
from wrapq.graph.mixtures import EXPERT_NAME
from wrapq.registry import Options
from wrapq.resolve.plan import Plan

_LOAD = f"import torchao; torch.export.load('{PROGRAM}').module()(input_ids, attention_mask) gives the logits"
_REMEDY = "quantize it otherwise, leave it float, or run with export=none"
_SAME, _STEP, _COARSE_STEP = 1e-3, 5e-2, 0.25
"""Weights alone; and activations, where a number between two steps may fall to either side, as the operators multiply
by the reciprocal of a scale; with fewer than 8 bits each such step is large."""
_TRIED = 2, 8  # sequences and tokens of the example; both are left open


class TorchExportOptions(Options):
    """Options of the format."""

    strict: bool = Field(False, description="Trace by TorchDynamo, which refuses what it cannot prove.")


class Logits(nn.Module):
    """A language model as a function of token ids and attention mask, both [B, T]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@EXPORTERS.register("torch_export")
class TorchExport(Exporter):
    """Exporter of programs of `torch.export`."""

    Options = TorchExportOptions
    options: TorchExportOptions
    weights: ClassVar[str] = PROGRAM

    def check(self, plan: Plan) -> Iterable[Problem]:
        refusals = Refusals()
        for module in plan.modules:
            for point in module.points:
                if reason := inexpressible(point.quant_spec, point.role == "weight"):
                    refusals.refuse(module, f"{point.name} in {point.quant_spec}: {reason}", _REMEDY)
            if EXPERT_NAME.fullmatch(module.name):
                what = "which tokens come to an expert depends on the data, which torch.export does not follow"
                refusals.refuse(module, what, "run with export=none, or export=compressed_tensors")
        if plan.recipe.float_prefix:
            what = "no operator says that first tokens stay float"
            refusals.refused["", what, "run with float_prefix=0, or with export=none"] = ["float_prefix"]
        yield from refusals.problems
        try:
            version(NEEDED)
        except PackageNotFoundError:
            what = f"the operators of quantized tensors come from {NEEDED}, which is not installed"
            yield Problem("", "export.format", what, (), "pip install 'wrapq[torch_export]'")

    def export(self, model: nn.Module, plan: Plan, folder: Folder) -> None:
        if problems := list(self.check(plan)):
            raise PlanError(problems)
        device = next(model.parameters()).device
        ids = torch.arange(_TRIED[0] * _TRIED[1], device=device).view(_TRIED)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        open_axes = dict.fromkeys(given, (torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC))
        function = Logits(lower(model)).eval()
        try:
            with torch.no_grad():
                program = torch.export.export(function, (), given, dynamic_shapes=open_axes, strict=self.options.strict)
        except Exception as error:  # of what the tracer met in somebody else's code, there is no list
            raise ModelError(f"torch.export does not take this model: {_first_line(error)}") from error

        def save(path: Path) -> None:
            with path.open("wb") as file:  # by its name, torch would say that this is no .pt2 yet
                torch.export.save(program, file)

        folder.write(PROGRAM, save)

    def read(self, folder: Path, ids: Tensor, device: str) -> Reading:
        logits, reason = read(folder, ids, device, run_program.__file__)
        if not logits:
            raise ModelError(f"torch.export.load does not run the export: {reason}")
        return Reading(logits[LOGITS])

    def layers(self, plan: Plan) -> Iterable[str]:
        yield f"{PROGRAM}: {len(plan.modules)} modules in quantized_decomposed and torchao operators"

    def notes(self, plan: Plan) -> Iterable[str]:
        yield _LOAD

    def tolerance(self, plan: Plan) -> float:
        specs = [p.quant_spec for module in plan.modules for p in module.points if p.role == "activation"]
        if not specs:
            return _SAME if plan.model.dtype == "float32" else _STEP
        return _STEP if all(spec.dtype.bits >= 8 for spec in specs) else _COARSE_STEP


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
