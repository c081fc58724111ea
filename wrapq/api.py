"""The Python API: prepare any module, calibrate it or run data through it in a loop of one's own, convert it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from wrapq.algorithms.base import ALGORITHMS, Algorithm, Rounder
from wrapq.algorithms.ranges import Ranges
from wrapq.algorithms.transform import Transform
from wrapq.calibration.assignments import Assignments
from wrapq.calibration.walker import Schedule, Walker
from wrapq.engine.apply_transforms import Figures
from wrapq.engine.quantize_module import Given, TransformStep, as_batch, example_of, finalize_points, run_transforms
from wrapq.errors import CalibrationError, LifecycleError, PlanError, Problem, SpecError
from wrapq.graph.blocks import Batch
from wrapq.observers.forward_context import in_context
from wrapq.quant.spec import FLOAT, QuantSpec
from wrapq.recipe.provenance import Provenance
from wrapq.recipe.schema import Match, Rule, Stage
from wrapq.registry import Place, option_problems
from wrapq.resolve.plan import specs_of
from wrapq.resolve.resolve import resolve_specs
from wrapq.resolve.rules import Sources
from wrapq.resolve.stages import StackEntry, check_stack
from wrapq.resolve.transforms import Transforms
from wrapq.wrappers.experts import apart, take_apart
from wrapq.wrappers.model import convert_model, iter_quantizers, iter_wrapped, unready, unwrap_model, wrap_model
from wrapq.wrappers.quantizer import WeightQuantizer

_ACTIVATION = "int8:tensor:asym"
Spec = str | QuantSpec


@dataclass(frozen=True)
class PTQConfig:
    """What `prepare` does to a model.

    Attributes:
        weight: the spec of every weight, in short form; None leaves weights float.
        activation: the spec of what matrix products with weights and convolutions read, which is what int8 runtimes of
            servers quantize: the input of linear layers and convolutions; None leaves it float.
        overrides: for modules by name, glob or `re:` pattern, in order, the specs of single points, None for a
            point or for all of a module's to leave float:
            `{"lm_head": None, "*.down_proj": {"weight": "int8:channel"}}`.
        strict: a module with parameters that has no wrapper is an error.
        activations: the spec of every point but the weights, as a processor without float units needs: norms,
            functions, queries, keys, sums, too. It takes the place of `activation`.

    Example:
        >>> PTQConfig(weight="int4:g128:sym", activation=None, overrides={"lm_head": None})
    """

    weight: Spec | None = "int8:channel:sym"
    activation: Spec | None = _ACTIVATION
    overrides: Mapping[str, Mapping[str, Spec | None] | None] = field(default_factory=dict)
    strict: bool = False
    activations: Spec | None = None

    def rules(self) -> dict[str, Rule]:
        """The same as the rules of a recipe; raises `PlanError` where there is nothing to say, or an empty pattern."""
        if problems := list(self._problems()):
            raise PlanError(problems)
        weight, some, every = (None if spec is None else str(spec) for spec in self._specs().values())
        rules = {}
        if weight or some or every:
            match = Match(name="*")
            rules["config"] = Rule(match=match, weight=weight, activation=None if every else some, activations=every)
        for pattern, points in self.overrides.items():
            match, name = Match(name=pattern), f"overrides[{pattern!r}]"
            if points is None:
                rules[name] = Rule(match=match, quantize=False)
            else:
                rules[name] = Rule(match=match, points={point: str(spec or FLOAT) for point, spec in points.items()})
        return rules

    def _specs(self) -> dict[str, Spec | None]:
        return {"weight": self.weight, "activation": self.activation, "activations": self.activations}

    def _problems(self) -> Iterator[Problem]:
        specs = self._specs()
        yield from _wrong_specs("PTQConfig", specs)
        if self.activations is not None and self.activation not in (None, _ACTIVATION):
            what = f"activation is {self.activation}, and activations, {self.activations}, takes its place"
            yield Problem("", "PTQConfig", what, (), "give one of them; overrides can set single points")
        if not any(specs.values()) and not any(self.overrides.values()):
            what = "quantizes nothing: weight, activation and activations are None, and no override has a spec"
            yield Problem("", "PTQConfig", what)
        for pattern, points in self.overrides.items():
            if not pattern:
                yield Problem("", "PTQConfig.overrides", "'' is no pattern: '*' means every module")
            if points is not None and not isinstance(points, Mapping):
                what = f"{pattern!r}: {points!r} should be a mapping from points to specs, or None"
                yield Problem("", "PTQConfig.overrides", what, (), "for example {'weight': 'int8:channel'}")
            else:
                yield from _wrong_specs(f"PTQConfig.overrides[{pattern!r}]", points or {})


def _wrong_specs(where: str, specs: Mapping[str, Spec | None]) -> Iterator[Problem]:
    for point, spec in specs.items():
        try:
            if spec is not None and spec != FLOAT:
                QuantSpec.parse(str(spec))
        except SpecError as error:
            yield Problem("", f"{where}.{point}", str(error))


def prepare(model: nn.Module, config: PTQConfig | None = None) -> nn.Module:
    """Put quantization points into `model`; run calibration data through the result, then `convert` it.

    Modules are replaced in place where they have a parent; a model that is itself one layer is replaced as a whole,
    so use what is returned. When anything is wrong the model is left as it was.

    Raises:
        PlanError: overrides that match nothing, specs that fit no module; all of them at once.
        LifecycleError: the model is prepared already.
    """
    config = config or PTQConfig()
    rules = config.rules()
    sources = Sources({f"rules.{name}": Provenance("PTQConfig") for name in rules})
    with apart(model):
        modules, untouched = resolve_specs(rules, model, sources)
    missing = [row for row in untouched if row.reason == "no wrapper"]
    if config.strict and missing:
        what = ", ".join(f"{row.name or 'the model itself'} ({row.type})" for row in missing)
        raise PlanError([Problem("", "PTQConfig", f"strict, and there is no wrapper for {what}")])
    return wrap_model(model, specs_of(modules))


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
    batches: Iterable[Given],
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
    algorithms = {entry.name: entry.algorithm for entry in _check(stack, schedule)}
    assignments = Assignments.from_stack(model, algorithms.values())
    given = [as_batch(model, batch) for batch in batches]
    transforms = {name: algorithm for name, algorithm in algorithms.items() if isinstance(algorithm, Transform)}
    figures, notes = _transform(model, transforms, given) if transforms else ({}, [])
    if transforms:  # which put new wrappers in
        assignments = Assignments.from_stack(model, algorithms.values())
    result = finalize_points(model, assignments, given, schedule)
    deciding = {**assignments.rounders, **assignments.range_setters}
    return Calibrated(deciding, result.reports, result.fallbacks, result.statistics, figures, notes)


def convert(model: nn.Module, rounding: str = "rtn") -> nn.Module:
    """Replace the prepared modules by ones that hold integers; weights not rounded yet are rounded now.

    Args:
        model: what `prepare` returned, after calibration.
        rounding: the name of a rounding algorithm that needs no data.

    Raises:
        LifecycleError: naming every point that saw no data, before anything is changed.
        CalibrationError: NaN or infinity in what a point saw or in a weight.
    """
    waiting = [q for q in iter_quantizers(model) if not isinstance(q, WeightQuantizer)]
    if failures := unready(waiting):
        shown = "\n  ".join(failures[:10])
        raise LifecycleError(f"cannot convert, {len(failures)} points are not ready:\n  {shown}")
    algorithm = ALGORITHMS.get(rounding)
    if not issubclass(algorithm, Rounder):
        raise LifecycleError(f"{rounding} does not round weights")
    rounders = dict.fromkeys((q.where for q in iter_quantizers(model)), algorithm())
    range_setters = dict.fromkeys((q.where for q in waiting), Ranges())
    Walker(model, Assignments(rounders, range_setters)).run([], "parallel")
    return convert_model(model)


def restore(model: nn.Module) -> nn.Module:
    """Undo `prepare`: put the float modules back exactly as they were."""
    if next(iter_wrapped(model), None) is None:
        raise LifecycleError("the model is not prepared: nothing to restore")
    return unwrap_model(model)


@contextmanager
def padding(mask: Tensor) -> Iterator[None]:
    """While this holds, only tokens whose `mask` [B, T] is true enter the statistics of a prepared model.

    Example:
        >>> with wrapq.padding(batch["attention_mask"]):
        ...     model(**batch)
    """
    with in_context(padding=mask.to(torch.bool)):
        yield


def _check(stack: Mapping[str, str | Mapping[str, Any]], schedule: Schedule) -> list[StackEntry]:
    """The stages in order, checked as those of a recipe are."""
    sources = Sources({f"stack.{name}": Provenance("calibrate") for name in stack})
    stages: dict[str, Stage] = {}
    problems: list[Problem] = []
    for name, entry in stack.items():
        if not isinstance(entry, str | Mapping):
            what = f"stack.{name}: {entry!r} is neither an algorithm's name nor a mapping with its options"
            remedy = 'write "gptq" or {"algorithm": "gptq", "damp": 0.05}'
            problems.append(Problem("", "calibrate", what, (), remedy))
            continue
        try:
            stages[name] = Stage.model_validate({"algorithm": entry} if isinstance(entry, str) else dict(entry))
        except ValidationError as error:
            problems += option_problems(error, Place(f"stack.{name}", "algorithm", (), sources.of, "a stage"), Stage)
    entries, wrong = check_stack(stages, sources, parallel=schedule == "parallel")
    problems += wrong
    for phase in ("round", "range"):
        twice = [entry.name for entry in entries if entry.algorithm.phase == phase]
        if len(twice) > 1:
            problems.append(Problem("", "calibrate", f"stages {' and '.join(twice)} would decide the same points"))
    if problems:
        raise PlanError(problems)
    return entries


def _transform(
    model: nn.Module, transforms: Mapping[str, Transform], batches: Sequence[Batch]
) -> tuple[dict[str, Figures], list[str]]:
    """Run `transforms`, by the names of their stages and in order, on a prepared model, which is float meanwhile; see
    `run_transforms`.

    Raises:
        PlanError: one has nothing to do or cannot run where it stands; before anything is changed.
    """
    if not batches:
        raise CalibrationError("transforms need at least one batch, to follow the model and to compare its outputs")
    specs = {
        name: {point: quantizer.spec for point, quantizer in module.point_quantizers().items()}
        for name, module in iter_wrapped(model)
    }
    if "" in specs:
        what = "transforms change modules that follow each other; this model is one"
        raise PlanError([Problem("", "calibrate", what)])
    unwrap_model(model)
    try:
        take_apart(model, specs)
        plan = Transforms(model, specs, example_of(model, batches[0]))
        after = {name: list(transforms.values())[number:] for number, name in enumerate(transforms, 1)}
        planned = {name: plan.plan(name, type(t).__name__, t, after[name]) for name, t in transforms.items()}
        if problems := [problem for *_, found in planned.values() for problem in found]:
            raise PlanError(problems)
        steps = [TransformStep(name, transform, planned[name][0]) for name, transform in transforms.items()]
        return run_transforms(model, plan.graph, specs, steps, batches)
    finally:
        wrap_model(model, specs)
