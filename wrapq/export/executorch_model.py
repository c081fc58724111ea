"""A program of ExecuTorch, which runs on phones and other small machines, with the products of XNNPACK on their CPUs:
token ids of one sequence in, logits out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from wrapq.errors import ModelError, first_line
from wrapq.export import run_executorch
from wrapq.export.base import EXPORTERS, Folder, Refusals
from wrapq.export.lowering import NEEDED, in_float32, lower
from wrapq.export.program import Example, ProgramExporter, example_ids, traced
from wrapq.export.run_executorch import METHOD, MODEL
from wrapq.foreign import quiet
from wrapq.quant.spec import QuantSpec
from wrapq.registry import Options
from wrapq.resolve.plan import ModulePlan, Plan

_DYNAMIC, _STATIC = "int8:token:asym:dyn", "int8:tensor:asym"
_LINEAR = "Linear"
"""The wrapper of what XNNPACK has integer products for."""
_GROUP_STEP = 32
_LOUD = ("executorch", "torchao")


class ExecuTorchOptions(Options):
    """Options of the format."""

    max_tokens: int = Field(512, ge=2, description="The longest sequence it takes; memory is laid out for it.")


class LogitsOfSequence(nn.Module):
    """A language model as a function of the token ids [1, T] of one sequence without padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Any:
        return self.model(input_ids=input_ids, use_cache=False).logits


@EXPORTERS.register("executorch")
class ExecuTorch(ProgramExporter):
    """Exporter of programs of ExecuTorch, which compute in float32 but for products of integers."""

    Options = ExecuTorchOptions
    options: ExecuTorchOptions
    weights: ClassVar[str] = MODEL
    extra: ClassVar[tuple[str, tuple[str, ...]]] = "executorch", (NEEDED, "executorch")
    runtime: ClassVar[tuple[str, str]] = "ExecuTorch", run_executorch.__file__
    in_float32: ClassVar[bool] = True

    def inexpressible(self, spec: QuantSpec, weight: bool) -> str | None:
        if reason := super().inexpressible(spec, weight):
            return reason
        if spec.dtype.kind != "int" or not spec.dtype.signed or spec.dtype.bits > 8:
            return "XNNPACK has signed integers of at most 8 bits"
        return _weight_reason(spec) if weight else _activation_reason(spec)

    def refusals(self, modules: Iterable[ModulePlan]) -> Refusals:
        modules = tuple(modules)
        refusals = super().refusals(modules)
        for module in modules:
            if found := _refusal(module):
                refusals.refuse(module, *found)
        return refusals

    def write(self, model: nn.Module, folder: Folder) -> None:
        made = executorch_program(model, self.options.max_tokens)
        folder.write(MODEL, lambda path: path.write_bytes(made))

    def write_module(self, model: nn.Module, example: Example, folder: Folder) -> None:
        made = compiled(example.traced(in_float32(lower(model)), whole=True))
        folder.write(MODEL, lambda path: path.write_bytes(made))

    def layers(self, plan: Plan) -> Iterable[str]:
        linear = sum(module.wrapper == _LINEAR for module in plan.modules)
        yield f"{MODEL}: {linear} linear layers in XNNPACK's integers, {len(plan.modules) - linear} other modules"

    def notes(self, plan: Plan) -> Iterable[str]:
        yield (
            f"{MODEL}: the method {METHOD} takes input_ids [1, T] of at most {self.options.max_tokens} tokens, "
            "one sequence without padding, and gives the logits"
        )
        if plan.model.dtype != "float32":
            yield f"{MODEL} computes in float32 and holds the rest in it, where the model is in {plan.model.dtype}"


def executorch_program(model: nn.Module, max_tokens: int) -> bytes:
    """The language `model`, converted or float, as a program of ExecuTorch with what XNNPACK takes on handed to it.

    Args:
        model: the one; on a CPU.
        max_tokens: the longest sequence it takes.

    Raises:
        ModelError: torch.export or ExecuTorch does not take it.
    """
    longest = getattr(cast(Any, model).config.get_text_config(), "max_position_embeddings", None) or max_tokens
    tokens = torch.export.Dim("tokens", min=2, max=min(max_tokens, longest))
    function = LogitsOfSequence(in_float32(lower(model))).eval()
    return compiled(traced(function, {"input_ids": example_ids(model, 1, 8)}, {"input_ids": {1: tokens}}))


def compiled(program: Any) -> bytes:
    """A program of `torch.export` as one of ExecuTorch; `ModelError` where it does not take it."""
    with quiet(*_LOUD):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        # its check of the graph knows no quantized operators
        config = EdgeCompileConfig(_check_ir_validity=False)
        try:
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=config)
            return bytes(edge.to_executorch().buffer)
        except Exception as error:  # of what the compiler met in somebody else's code, there is no list
            raise ModelError(f"ExecuTorch does not take this model: {first_line(error)}") from error


def _weight_reason(spec: QuantSpec) -> str | None:
    """What XNNPACK does not know of a weight's `spec` in integers, with the nearest that it does."""
    if not spec.symmetric or spec.signed_scale:
        return "XNNPACK's weights have no zero points and no negative scales, as sym has none"
    if spec.granularity == "channel" and (spec.axis or 0) % 2 == 0:
        return None
    if spec.granularity == "group" and spec.dtype.bits == 4 and (spec.group_size or 0) % _GROUP_STEP == 0:
        return None
    return f"XNNPACK has weights by channel, and int4 in groups of {_GROUP_STEP} or a multiple of it"


def _activation_reason(spec: QuantSpec) -> str | None:
    if spec.dynamic:
        known = spec.dtype.bits == 8 and spec.granularity == "token" and not spec.symmetric
        return None if known else f"XNNPACK finds ranges as tokens come in {_DYNAMIC} only"
    return None if spec.granularity == "tensor" else "between operators XNNPACK has one scale for a tensor"


def _refusal(module: ModulePlan) -> tuple[str, str] | None:
    """Why XNNPACK cannot compute with what is quantized of `module`, and what it can; each point by itself it can."""
    specs = {point.name: point.quant_spec for point in module.points}
    dynamic = [name for name, spec in specs.items() if spec.dynamic and (name, module.wrapper) != ("input", _LINEAR)]
    if dynamic:
        what = f"XNNPACK finds ranges as tokens come at the input of linear layers only, not at {dynamic[0]}"
        return what, f"quantize it in {_STATIC}, or leave it float"
    weight, inputs = specs.get("weight"), specs.get("input")
    if weight is None:
        if inputs is not None and inputs.dynamic:
            what = "XNNPACK finds ranges as tokens come for products with integers only, and the weight is float"
            return what, "quantize its weight in int8:channel, or leave its input float"
        return None
    if module.wrapper != _LINEAR:
        return f"XNNPACK has integers for weights of linear layers, not of {module.wrapper}", "leave its weight float"
    if inputs is None:
        return "XNNPACK multiplies integers by integers, and the input is float", f"quantize its input in {_DYNAMIC}"
    if inputs.dynamic:
        return None
    if weight.granularity == "group":
        what = "XNNPACK multiplies weights in groups by inputs whose ranges are found as tokens come"
        return what, f"quantize its input in {_DYNAMIC}, or its weight in int8:channel"
    if "output" not in specs:
        what = "XNNPACK multiplies integers of fixed ranges where the output has one, too"
        return what, f"quantize its output in {_STATIC} as well, or its input in {_DYNAMIC}"
    return None
