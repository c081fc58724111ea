"""A recipe on any module: its rules and its stack, on the caller's batches, without data, record or files of a run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from wrapq.algorithms.transform import Transform
from wrapq.calibration.assignments import Assignments
from wrapq.calibration.finalize import WalkResult
from wrapq.calibration.processes import Processes
from wrapq.calibration.pt2e_parts import quantize_parts
from wrapq.calibration.token_weights import gather_token_weights, linears_by_gradient
from wrapq.calibration.walker import Schedule, Walker, WalkOptions
from wrapq.engine.apply_transforms import Figures, apply_transform, checked
from wrapq.errors import CalibrationError, LifecycleError, Problem, RecipeError
from wrapq.graph.blocks import Batch, without_cache
from wrapq.graph.dataflow import Graph, find_graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.half_products import fast_half_products
from wrapq.recipe.compose import Composed, compose
from wrapq.resolve.part_plans import quantizer_of
from wrapq.resolve.plan import Untouched, specs_of
from wrapq.resolve.resolve import resolve_module
from wrapq.resolve.rules import Sources
from wrapq.resolve.stages import algorithm_of
from wrapq.runtime.module import QuantizedModule
from wrapq.wrappers.experts import take_apart
from wrapq.wrappers.model import Specs, convert_model, iter_wrapped, unwrap_model, wrap_model

Given = Mapping[str, Any] | Tensor | Sequence[Any]
"""The arguments of one forward: by name, one tensor, or several in order."""
_EXAMPLE_TOKENS = 4
_IMAGE_RANK = 4  # [B, C, H, W]
_log = logging.getLogger(__name__)


def quantize(
    module: nn.Module, recipe: str | Path | Composed, batches: Iterable[Given], overrides: Sequence[str] = ()
) -> nn.Module:
    """Quantize any module by a recipe: its rules on the module's own names, its stack on `batches`.

    What a recipe says of its model, data, evaluation, goals, export and tracking, and the machine's settings, are not
    looked at; of `calibration` only the `schedule` is. Modules that stay float are logged as warnings, as are weights
    that are rounded otherwise than by their algorithm, and places that a transform leaves alone as information. How
    good the result is the caller measures.

    Args:
        module: with its weights, on the device where it shall run. It is put into evaluation mode and changed in place:
            give `copy.deepcopy(module)` to keep it. One that is itself a layer is replaced, so use what is returned.
        recipe: the name of one, as `wrapq presets` lists them, or its file; or what `wrapq.recipe.compose.compose`
            returned.
        batches: calibration data on the module's device, as in `calibrate`. They may be none where no stage looks at
            data.
        overrides: Hydra overrides, such as `rules.linear.match.type=[Linear,Conv2d]`.

    Returns:
        The module that holds integers, as `convert` gives it.

    Raises:
        RecipeError: the recipe does not compose.
        PlanError: rules that fit nothing, specs that fit no module, stages with nothing to do; all of them at once, and
            the module is as it was.
        CalibrationError, ModelError, LifecycleError: from the data, a transform that changed the module's function, a
            point that no batch reached. The module is float then, with transforms in its weights.

    Example:
        >>> model = wrapq.quantize(model, "w8a8_static", batches)
        >>> model = wrapq.quantize(model, "w8a16", (), ["rules.linear.match.type=[Linear,Conv2d]"])
    """
    if next(iter_wrapped(module), None) is not None or any(isinstance(m, QuantizedModule) for m in module.modules()):
        raise LifecycleError("the module is prepared or quantized already: give the float one")
    composed = _composed(recipe, overrides)
    given = [as_batch(module, batch) for batch in batches]
    with fast_half_products():
        return _quantize(_in_evaluation(module), composed, given)


def _in_evaluation(module: nn.Module) -> nn.Module:
    """`module` in evaluation mode; a graph in it, which PT2E converted, has one mode and refuses to be told."""
    if not any(isinstance(each, GraphModule) for each in module.modules()):
        return module.eval()
    for each in module.modules():
        each.training = False
    return module


def _composed(recipe: str | Path | Composed, overrides: Sequence[str]) -> Composed:
    if not isinstance(recipe, Composed):
        return compose([f"recipe={recipe}", *overrides])
    if overrides:
        what = f"{overrides[0]}: the recipe is composed already"
        raise RecipeError([Problem("", "quantize.overrides", what, (), "give the overrides to compose")])
    return recipe


def _quantize(module: nn.Module, composed: Composed, given: Sequence[Batch]) -> nn.Module:
    inputs = example_of(module, given[0]) if given else None
    found = resolve_module(composed.recipe, module, Sources(composed.sources), inputs)
    name, specs = composed.recipe.name, specs_of(found.modules)
    for note in (*_left_in_float(found.untouched), *found.notes):
        _log.warning("%s: %s", name, note)
    for note in found.skipped:
        _log.info("%s: %s", name, note)
    stages = [(stage, algorithm_of(stage)) for stage in found.stages]
    steps = [TransformStep(s.name, a, s.targets) for s, a in stages if isinstance(a, Transform) and s.targets]
    if steps:
        take_apart(module, specs)
        _, notes = run_transforms(module, find_graph(module, inputs), specs, steps, given)
        for note in notes:
            _log.warning("%s: %s", name, note)
    module = wrap_model(module, specs)
    try:
        assignments = Assignments.from_stages((algorithm, stage.targets) for stage, algorithm in stages)
        result = finalize_points(module, assignments, given, composed.recipe.calibration.schedule)
        module = quantize_parts(module, {part.name: quantizer_of(part) for part in found.parts}, given)
    except BaseException:
        unwrap_model(module)
        raise
    for reason in result.fallbacks:
        _log.warning("%s: %s", name, reason)
    return convert_model(module)


def _left_in_float(untouched: Iterable[Untouched]) -> Iterator[str]:
    """Of each class and reason that there is, which modules with weights stay float."""
    kinds: dict[tuple[str, str], list[Untouched]] = {}
    for row in untouched:
        if row.parameters:
            kinds.setdefault((row.type, row.reason), []).append(row)
    for (kind, reason), rows in kinds.items():
        first, count = rows[0].name or "the module itself", sum(row.parameters for row in rows)
        many = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        yield f"{kind} {first}{many} with {count:,} parameters stay float: {reason}"


def finalize_points(
    model: nn.Module, assignments: Assignments, batches: Sequence[Batch], schedule: Schedule
) -> WalkResult:
    """Finalize all points of a wrapped model in a walk of `batches`; see `Walker.run`."""
    weights = gather_token_weights(model, enumerate(batches), linears_by_gradient(model, assignments))
    walker = Walker(model, assignments, WalkOptions(token_weights=weights))
    walker.run(batches, schedule)
    return walker.result


class TransformStep(NamedTuple):
    """A stage of the name `stage` whose transform changes `targets`."""

    stage: str
    transform: Transform
    targets: tuple[str, ...]


def run_transforms(
    model: nn.Module, graph: Graph, specs: Specs, steps: Sequence[TransformStep], batches: Sequence[Batch]
) -> tuple[dict[str, Figures], list[str]]:
    """Run transforms on a float model, the outputs for the first batch compared after each; returns what each reports,
    by stage and target, and the notes of `GraphRewriter.notes`.

    Raises:
        ModelError: one changed the model's function; what it did is undone.
    """
    rewriter, figures = GraphRewriter(model, graph, specs), dict[str, Figures]()
    for step in steps:
        with checked(rewriter, batches[0], step.stage, step.transform.tolerance):
            figures[step.stage] = apply_transform(rewriter, step.transform, step.targets, batches, Processes())
    return figures, rewriter.notes


def as_batch(model: nn.Module, given: Given) -> Batch:
    """Arguments of a forward as its keyword arguments, and the mask [B, T] of real tokens where there is one."""
    if isinstance(given, str):  # a name of the one mapping that was given in place of several
        raise CalibrationError(f"a batch that is the text {given!r}: give a list of batches, such as [batch]")
    if isinstance(given, Mapping):
        inputs = dict(given)
    else:
        arguments = (given,) if isinstance(given, Tensor) else tuple(given)
        signature = inspect.signature(model.forward)
        names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(arguments) > len(names):
            what = f"a batch of {len(arguments)} arguments, and {type(model).__name__}.forward names {len(names)}"
            raise CalibrationError(f"{what}: give batches as mappings by name")
        inputs = dict(zip(names, arguments, strict=False))
    mask = inputs.get("attention_mask")
    return Batch(without_cache(model, inputs), mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None)


def example_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """A few tokens of one text of `batch`, or one of its images, enough to follow the model; all of it where it is of
    neither."""
    ids = batch.inputs.get("input_ids")
    if isinstance(ids, Tensor):
        return {
            name: value[:1, :_EXAMPLE_TOKENS] if isinstance(value, Tensor) and value.shape == ids.shape else value
            for name, value in batch.inputs.items()
        }
    tensors = [value for value in batch.inputs.values() if isinstance(value, Tensor)]
    if all(value.dim() >= _IMAGE_RANK for value in tensors) and len({len(value) for value in tensors}) == 1:
        one = {name: value[:1] if isinstance(value, Tensor) else value for name, value in batch.inputs.items()}
        with torch.no_grad():
            try:
                model(**one)
            except Exception:  # its first axis is another, as without a batch
                return dict(batch.inputs)
        return one
    return dict(batch.inputs)
