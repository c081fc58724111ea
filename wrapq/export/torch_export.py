"""A program of `torch.export`: the graph of the model in standard operators, with its integers, in one file.

`torch.export.load` reads it wherever torch is, without transformers and without wrapq; AOTInductor, ExecuTorch and
other compilers take it from there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from wrapq.export import run_program
from wrapq.export.base import EXPORTERS, Folder
from wrapq.export.lowering import NEEDED, lower
from wrapq.export.program import OPEN, Example, ProgramExporter, example_ids, traced
from wrapq.export.run_program import PROGRAM
from wrapq.registry import Options
from wrapq.resolve.plan import Plan

_LOAD = f"import torchao; torch.export.load('{PROGRAM}').module()(input_ids, attention_mask) gives the logits"


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
class TorchExport(ProgramExporter):
    """Exporter of programs of `torch.export`."""

    Options = TorchExportOptions
    options: TorchExportOptions
    weights: ClassVar[str] = PROGRAM
    extra: ClassVar[tuple[str, tuple[str, ...]]] = "torch_export", (NEEDED,)
    runtime: ClassVar[tuple[str, str]] = "torch.export.load", run_program.__file__

    def program(self, model: nn.Module) -> Any:
        """The `ExportedProgram` of the converted `model`, as `Logits`, its batch and length open."""
        ids = example_ids(model, 2, 8)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        open_axes = dict.fromkeys(given, (OPEN, OPEN))
        return traced(Logits(lower(model)).eval(), given, open_axes, self.options.strict)

    def write(self, model: nn.Module, folder: Folder) -> None:
        self.save(self.program(model), folder)

    def write_module(self, model: nn.Module, example: Example, folder: Folder) -> None:
        self.save(example.traced(lower(model), strict=self.options.strict), folder)

    def save(self, program: Any, folder: Folder) -> None:
        """Write a program."""

        def save(path: Path) -> None:
            with path.open("wb") as file:  # by its name, torch would say that this is no .pt2 yet
                torch.export.save(program, file)

        folder.write(PROGRAM, save)

    def layers(self, plan: Plan) -> Iterable[str]:
        yield f"{PROGRAM}: {len(plan.modules) + len(plan.parts)} modules in quantized_decomposed and torchao operators"

    def notes(self, plan: Plan) -> Iterable[str]:
        yield _LOAD
