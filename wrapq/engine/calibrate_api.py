"""Calibration from Python: a stack of algorithms on any prepared module and any data, without a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError
from torch import Tensor, nn

from wrapq.algorithms.ranges import Ranges
from wrapq.algorithms.rtn import RTN
from wrapq.calibration.algorithm import Algorithm, Corrector, RangeSetter, Rounding, Transform
from wrapq.calibration.by_group import unsupported
from wrapq.calibration.forward import without_cache
from wrapq.calibration.walker import Batch, Schedule, Walker
from wrapq.engine.transform import Figures
from wrapq.engine.transform_api import transform_prepared
from wrapq.errors import CalibrationError, LifecycleError, PlanError, Problem
from wrapq.recipe.schema import Calibration, Evaluation, Recipe, Stage
from wrapq.resolve.rules import Sources
from wrapq.resolve.stages import StackEntry, check_stack, option_problems
from wrapq.wrappers.model import iter_wrapped
from wrapq.wrappers.quantizer import WeightQuantizer


@dataclass(frozen=True)
class Calibrated:
    """What `calibrate` did.

    Attributes:
        algorithms: the algorithm that decided each static point, by the point's full name.
        reports: for each weight its error and what its algorithm reports, likewise.
        fallbacks: why weights were rounded to nearest instead of by their algorithm, and experts have the range of
            others; empty is good.
        statistics: what the observer of each static activation point gathered.
        transforms: what each transform reports of each of its targets, by the name of the stage.
        notes: what else they say, such as which experts no token came to, and which weights are no longer tied.
    """

    algorithms: Mapping[str, Algorithm]
    reports: dict[str, dict[str, float]]
    fallbacks: list[str]
    statistics: dict[str, Tensor]
    transforms: Mapping[str, Figures]
    notes: list[str]


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor | Sequence[Any]],
    stack: Mapping[str, str | Mapping[str, Any]],
    schedule: Schedule = "sequential",
) -> Calibrated:
    """Run `batches` through a prepared model and decide all its points by the algorithms of `stack`; then `convert` it.

    Weights that multiply no matrix, such as those of norms and embeddings, are rounded to nearest where the stack's
    algorithm needs the statistics of an input. Static activations take the range that their observer finds unless the
    stack names another algorithm for them. Transforms change the float weights before, and follow the model with the
    first batch.

    Args:
        model: what `prepare` returned.
        batches: the arguments of each forward: by name, one tensor, or several in order. Where one is called
            `attention_mask` and is [B, T], padding enters no statistic. No keys and values are kept unless a batch says
            `use_cache`.
        stack: algorithms by a name of your own, each by its name or with its options, as in a recipe:
            `{"round": {"algorithm": "gptq", "damp": 0.05}}`.
        schedule: `sequential`, each block sees what the quantized ones before it give, or `parallel`, the float model.

    Raises:
        PlanError: an unknown algorithm, a wrong option, two algorithms for the same points; all of them at once.
        CalibrationError, LifecycleError: from the data, or a point that no batch reached.

    Example:
        >>> model = wrapq.prepare(model, wrapq.PTQConfig(weight="int4:g64:sym", activation=None))
        >>> wrapq.calibrate(model, batches, {"round": "gptq"})
        >>> model = wrapq.convert(model)
    """
    if next(iter_wrapped(model), None) is None:
        raise LifecycleError("the model is not prepared: call prepare first")
    entries = _check(stack, schedule)
    rounders, setters = _assign(model, entries)
    given = [_as_batch(model, batch) for batch in batches]
    made = {entry.name: entry.algorithm(entry.options) for entry in entries}
    transforms = {name: algorithm for name, algorithm in made.items() if isinstance(algorithm, Transform)}
    figures, notes = transform_prepared(model, transforms, given) if transforms else ({}, [])
    if transforms:  # which put new wrappers in
        rounders, setters = _assign(model, entries)
    walker = Walker(model, rounders, setters)
    walker.correctors = _correctors(model, entries)
    walker.run(given, schedule)
    return Calibrated({**rounders, **setters}, walker.reports, walker.fallbacks, walker.statistics, figures, notes)


def _check(stack: Mapping[str, str | Mapping[str, Any]], schedule: Schedule) -> list[StackEntry]:
    """The stages in order, checked as those of a recipe are."""
    sources = Sources({f"stack.{name}": "calibrate" for name in stack})
    stages: dict[str, Stage] = {}
    problems: list[Problem] = []
    for name, said in stack.items():
        if not isinstance(said, str | Mapping):
            what = f"stack.{name}: {said!r} is neither an algorithm's name nor a mapping with its options"
            problems.append(Problem("calibrate", what, remedy='write "gptq" or {"algorithm": "gptq", "damp": 0.05}'))
            continue
        try:
            stages[name] = Stage.model_validate({"algorithm": said} if isinstance(said, str) else dict(said))
        except ValidationError as error:
            problems += option_problems(error, f"stack.{name}", [*Stage.model_fields], "a stage", sources)
    # the rest of a recipe is not asked for
    recipe = Recipe.model_construct(
        stack=stages,
        rules={},
        stack_order=None,
        calibration=Calibration.model_construct(schedule=schedule),
        evaluation=Evaluation.model_construct(),
    )
    entries, wrong = check_stack(recipe, sources)
    problems += wrong
    for phase in ("round", "range"):
        twice = [entry.name for entry in entries if entry.algorithm.phase == phase]
        if len(twice) > 1:
            problems.append(Problem("calibrate", f"stages {' and '.join(twice)} would decide the same points"))
    deciding = Rounding | RangeSetter | Corrector | Transform
    others = [entry for entry in entries if not issubclass(entry.algorithm, deciding)]
    problems += [Problem(sources.where(f"stack.{e.name}"), f"{e.stage.algorithm} decides no point") for e in others]
    if problems:
        raise PlanError(problems)
    return entries


def _assign(model: nn.Module, entries: Sequence[StackEntry]) -> tuple[dict[str, Rounding], dict[str, RangeSetter]]:
    """The algorithm of each weight, and of each other point, by the point's full name."""
    rounder: Rounding | None = None
    setter: RangeSetter = Ranges()
    for entry in entries:
        algorithm = entry.algorithm(entry.options)
        if isinstance(algorithm, Rounding):
            rounder = algorithm
        elif isinstance(algorithm, RangeSetter):
            setter = algorithm
    nearest, rounders, setters, problems = RTN(), {}, {}, []
    for _, module in iter_wrapped(model):
        for quantizer in module.point_quantizers().values():
            if not isinstance(quantizer, WeightQuantizer):
                setters[quantizer.where] = setter
                continue
            usable = rounder is not None and (module.wrapper.multiplies(module) or not rounder.needs)
            chosen = rounder if rounder is not None and usable else nearest
            rounders[quantizer.where] = chosen
            rows, groups = len(module.float_weight()), module.wrapper.groups(module)  # rows, where there are groups
            if (reason := unsupported(chosen, quantizer.spec, rows, groups)) is not None:
                problems.append(Problem("calibrate", f"{quantizer.where}, {quantizer.spec}: {reason}"))
    if problems:
        raise PlanError(problems)
    return rounders, setters


def _correctors(model: nn.Module, entries: Sequence[StackEntry]) -> dict[str, list[Corrector]]:
    """The corrections of each weight that multiplies a matrix and takes them, by the point's full name."""
    made = [entry.algorithm(entry.options) for entry in entries]
    correctors = [algorithm for algorithm in made if isinstance(algorithm, Corrector)]
    weights = [m for _, m in iter_wrapped(model) if m.weight_quantizer is not None and m.wrapper.multiplies(m)]
    return {
        cast(WeightQuantizer, m.weight_quantizer).where: [c for c in correctors if c.takes(m.wrapper.__name__)]
        for m in weights
    }


def _as_batch(model: nn.Module, given: Mapping[str, Any] | Tensor | Sequence[Any]) -> Batch:
    """Arguments of a forward as its keyword arguments, and the mask [B, T] of real tokens where there is one."""
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
