"""An export of any converted module, for those that are no language models of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from wrapq.engine.export import Exported, check_target, whole_folder
from wrapq.engine.export_comparison import compared, last_digits_changed
from wrapq.engine.quantize_module import Given, as_batch
from wrapq.errors import CalibrationError, LifecycleError, PlanError, Problem
from wrapq.export.base import EXPORTERS, make_exporter
from wrapq.export.program import Example, ProgramExporter
from wrapq.export.stopwatch import OUTPUT
from wrapq.recipe.schema import Export
from wrapq.resolve.plan import ModulePlan, PointPlan
from wrapq.runs.folder import RunFolder
from wrapq.runtime.module import QuantizedModule, QuantizedWeight
from wrapq.runtime.stand_in import original_class
from wrapq.wrappers.model import iter_wrapped


def export_module(model: nn.Module, format: str, folder: str | Path, example: Given, **options: Any) -> Exported:
    """Export a converted module, load the export in its runtime, compare and measure it.

    What an export takes are the tensors of the `example`, in their order; its results are the tensors in what the
    module returns, in theirs. The first axis of an input stays open, and each axis of integers, where the module takes
    other sizes than those of the `example`, which for that should be 2 or more; `executorch` and `circle` take the
    sizes of the example alone.

    Args:
        model: one that `wrapq.quantize` or `wrapq.convert` returned; or a float one, to measure beside it.
        format: `torch_export`, `aot_inductor`, `onnx`, `openvino`, `executorch` or `circle`.
        folder: a new or an empty one.
        example: the arguments of one forward, by name, one tensor, or several in order; on it outputs are compared.
        options: those of the format.

    Returns:
        What was made. Its figures are `size_mb`, `latency_ms` for the example, `peak_mb` and `cosine`, the mean over
        rows of the first output of how near it is to the module's own.

    Raises:
        ProblemsError: there is no such format or option.
        LifecycleError, CalibrationError: the module is not converted; it takes or gives no tensor.
        PlanError: the format holds language models alone, or cannot say what is quantized; with everything it refuses.
        ModelError: the runtime does not take the module, or computes something else.
        OutputError: the folder cannot be written.
    """
    if next(iter_wrapped(model), None) is not None:
        raise LifecycleError("the module is prepared and not converted: wrapq.convert gives what can be exported")
    exporter = make_exporter(format, Export(**options))
    if not isinstance(exporter, ProgramExporter):
        able = [name for name in EXPORTERS if issubclass(EXPORTERS.get(name), ProgramExporter)]
        raise PlanError([Problem("", "export", f"{format} holds language models of a run alone", tuple(able))])
    modules = list(_planned(model))
    if problems := [*exporter.refusals(modules).problems, *exporter.missing_packages()]:
        raise PlanError(problems)
    given = as_batch(model, example).inputs
    inputs = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    if not inputs:
        raise CalibrationError("an example without a tensor: give the arguments of one forward")
    call = Example(inputs, {name: value for name, value in given.items() if name not in inputs})
    traced = call.in_float32() if exporter.in_float32 else call
    device, target = next(iter(inputs.values())).device, Path(folder)
    dtype = next((str(each.dtype).removeprefix("torch.") for each in model.parameters()), "float32")

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return [each.float().cpu() for each in call.function(model)(*inputs.values())]

    check_target(target, replace=False, needed_bytes=sum(each.nbytes for each in model.state_dict().values()))
    with _in_evaluation_mode(model), whole_folder(target) as partial:
        if not (ours := forward()):
            raise CalibrationError(f"{type(model).__name__} returns no tensor for the example")
        exporter.write_module(model, traced, RunFolder(partial))
        answer = exporter.read_outputs(partial, [*traced.inputs.values()], str(device))
        theirs = [answer.logits[f"{OUTPUT}{i}"].float() for i in range(len(answer.logits))]
        error, remark = compared(
            format, theirs, ours, exporter.rounding(modules, dtype), last_digits_changed(model)(forward)
        )
        size = exporter.size(partial)
        cosine = float(cosine_similarity(_rows(theirs[0]), _rows(ours[0])).mean())
    figures = {"cosine": cosine, "size_mb": size / 1e6, **answer.measured}
    return Exported(target, error, size, (remark,) * bool(remark), torch.get_num_threads(), figures)


@contextmanager
def _in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """By the attribute, as a graph that PT2E converted refuses to be told by `eval`."""
    training = [each for each in model.modules() if each.training]
    try:
        for each in training:
            each.training = False
        yield
    finally:
        for each in training:
            each.training = True


def _rows(outputs: Tensor) -> Tensor:
    return outputs.reshape(len(outputs) if outputs.dim() > 1 else 1, -1)


def _planned(model: nn.Module) -> Iterator[ModulePlan]:
    """What is quantized of a converted model, as a plan says it."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            points = [
                PointPlan(
                    name=point,
                    role="weight" if point == "weight" else "activation",
                    spec=str(spec),
                    sources=(f"{type(module).__name__}.{point}",),
                )
                for point, spec in module.specs.items()
            ]
            yield ModulePlan(
                name=name,
                type=original_class(module).__name__,
                wrapper=module.wrapper.__name__,
                block=None,
                multiplies=module.wrapper.multiplies(module),
                groups=module.wrapper.groups(module),
                has_bias=module._parameters.get("bias") is not None,
                weight_shape=module.matrix_shape if isinstance(module, QuantizedWeight) else None,
                points=tuple(points),
            )
