"""A Circle model, which the compilers of Samsung's ONE take for processors without floats: the token ids of one
sequence of a fixed length in, logits out."""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import redirect_stdout
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from wrapq.errors import ModelError, first_line
from wrapq.export import run_circle
from wrapq.export.base import EXPORTERS, Folder, Refusals
from wrapq.export.executorch_model import LogitsOfSequence
from wrapq.export.lowering import NEEDED, in_float32, lower
from wrapq.export.program import Example, ProgramExporter, example_ids, traced
from wrapq.export.run_circle import MODEL
from wrapq.foreign import quiet
from wrapq.quant.spec import QuantSpec
from wrapq.registry import Options
from wrapq.resolve.plan import ModulePlan, Plan

_BITS = (4, 8, 16)
_LOUD = ("tico",)


class CircleOptions(Options):
    """Options of the format."""

    tokens: int = Field(128, ge=2, description="The length of the sequences it takes, which is fixed.")


@EXPORTERS.register("circle")
class Circle(ProgramExporter):
    """Exporter of Circle models, whose integers of 4 and 8 bits are unsigned."""

    Options = CircleOptions
    options: CircleOptions
    weights: ClassVar[str] = MODEL
    extra: ClassVar[tuple[str, tuple[str, ...]]] = "circle", (NEEDED, "tico")
    runtime: ClassVar[tuple[str, str]] = "tico", run_circle.__file__
    in_float32: ClassVar[bool] = True
    takes_parts: ClassVar[bool] = False  # PT2E's integers of 8 bits are signed

    def inexpressible(self, spec: QuantSpec, weight: bool) -> str | None:
        if reason := super().inexpressible(spec, weight):
            return reason
        if spec.dtype.kind != "int" or spec.dtype.bits not in _BITS:
            return "Circle has integers of 4, 8 and 16 bits"
        if spec.dtype.bits == 16 and (not spec.dtype.signed or not spec.symmetric):
            return "Circle's integers of 16 bits are centred on zero: int16 with sym"
        return _weight_reason(spec) if weight else _activation_reason(spec)

    def refusals(self, modules: Iterable[ModulePlan]) -> Refusals:
        modules = tuple(modules)
        refusals = super().refusals(modules)
        for module in modules:
            for point in module.points:
                if point.role == "weight" and point.quant_spec.granularity == "tensor" and module.multiplies:
                    what = f"{point.name} in {point.spec}: Circle has weights of products by channel"
                    refusals.refuse(module, what, f"quantize it in {point.quant_spec.dtype.name}:channel")
        return refusals

    def write(self, model: nn.Module, folder: Folder) -> None:
        made = circle_model(model, self.options.tokens)
        folder.write(MODEL, lambda path: path.write_bytes(made))

    def write_module(self, model: nn.Module, example: Example, folder: Folder) -> None:
        made = _converted(example.traced(in_float32(lower(model, unsigned=True)), whole=True))
        folder.write(MODEL, lambda path: path.write_bytes(made))

    def layers(self, plan: Plan) -> Iterable[str]:
        yield f"{MODEL}: {len(plan.modules)} modules, integers of 4 and 8 bits unsigned"

    def notes(self, plan: Plan) -> Iterable[str]:
        yield (
            f"{MODEL} takes input_ids [1, {self.options.tokens}], one sequence, and gives the logits; "
            "fill up a shorter one behind its end"
        )
        yield "its times are those of tico's reference runtime, written in NumPy, and say nothing of a processor"
        if plan.model.dtype != "float32":
            yield f"{MODEL} holds in float32 what is not quantized, where the model is in {plan.model.dtype}"


def circle_model(model: nn.Module, tokens: int) -> bytes:
    """The converted language `model` in Circle, for one sequence of so many `tokens`.

    Raises:
        ModelError: torch.export or tico does not take it.
    """
    function, ids = LogitsOfSequence(in_float32(lower(model, unsigned=True))).eval(), example_ids(model, 1, tokens)
    return _converted(traced(function, {"input_ids": ids}, {"input_ids": None}))


def _converted(program: Any) -> bytes:
    with quiet(*_LOUD), redirect_stdout(io.StringIO()):  # it prints how many operators stay float
        from tico.utils.convert import convert_exported_module_to_circle

        try:
            return bytes(convert_exported_module_to_circle(program))
        except Exception as error:  # of what the converter met in somebody else's code, there is no list
            raise ModelError(f"tico does not take this model: {first_line(error)}") from error


def _weight_reason(spec: QuantSpec) -> str | None:
    if spec.signed_scale:
        return "Circle's scales are positive"
    if spec.granularity == "channel" and (spec.axis or 0) % 2 == 0:
        return None
    if spec.granularity == "tensor" and spec.dtype.bits == 16:
        return None
    return "Circle has weights by channel, and would hold others as floats"


def _activation_reason(spec: QuantSpec) -> str | None:
    if spec.dynamic or spec.granularity != "tensor":
        return "Circle has one fixed scale for a tensor between operators: int16:tensor:sym, int8:tensor:asym"
    return None
