"""The Python API: prepare any module, run data through it in a loop of one's own, convert it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from wrapq.calibration.algorithm import ALGORITHMS, RangeSetter, Rounder
from wrapq.calibration.walker import Walker
from wrapq.errors import LifecycleError, PlanError, Problem, SpecError
from wrapq.quant.spec import FLOAT, QuantSpec
from wrapq.recipe.schema import Match, Rule
from wrapq.resolve.resolve import resolve_specs
from wrapq.resolve.rules import Sources
from wrapq.wrappers.experts import apart
from wrapq.wrappers.model import convert_model, iter_quantizers, iter_wrapped, unwrap_model, wrap_model
from wrapq.wrappers.quantizer import PADDING, WeightQuantizer

Spec = str | QuantSpec


@dataclass(frozen=True)
class PTQConfig:
    """What `prepare` does to a model.

    Attributes:
        weight: the spec of every weight, in short form; None leaves weights float.
        activation: the spec of every other point; None leaves activations float.
        overrides: for modules by name, glob or `re:` pattern, in order, the specs of single points, None for a
            point or for all of a module's to leave float:
            `{"lm_head": None, "*.down_proj": {"weight": "int8:channel"}}`.
        strict: a module with parameters that has no wrapper is an error.

    Example:
        >>> PTQConfig(weight="int4:g128:sym", activation=None, overrides={"lm_head": None})
    """

    weight: Spec | None = "int8:channel:sym"
    activation: Spec | None = "int8:tensor:asym"
    overrides: Mapping[str, Mapping[str, Spec | None] | None] = field(default_factory=dict)
    strict: bool = False

    def rules(self) -> dict[str, Rule]:
        """The same as the rules of a recipe; raises `PlanError` where there is nothing to say, or an empty pattern."""
        if problems := list(self._problems()):
            raise PlanError(problems)
        weight, activation = (None if spec is None else str(spec) for spec in (self.weight, self.activation))
        rules = {}
        if weight or activation:
            rules["config"] = Rule(match=Match(name="*"), weight=weight, activations=activation)
        for pattern, points in self.overrides.items():
            match, name = Match(name=pattern), f"overrides[{pattern!r}]"
            if points is None:
                rules[name] = Rule(match=match, quantize=False)
            else:
                rules[name] = Rule(match=match, points={point: str(spec or FLOAT) for point, spec in points.items()})
        return rules

    def _problems(self) -> Iterator[Problem]:
        yield from _wrong_specs("PTQConfig", {"weight": self.weight, "activation": self.activation})
        if self.weight is None and self.activation is None and not any(self.overrides.values()):
            yield Problem("PTQConfig", "quantizes nothing: weight and activation are None, and no override has a spec")
        for pattern, points in self.overrides.items():
            if not pattern:
                yield Problem("PTQConfig.overrides", "'' is no pattern: '*' means every module")
            if points is not None and not isinstance(points, Mapping):
                what = f"{pattern!r}: {points!r} should be a mapping from points to specs, or None"
                yield Problem("PTQConfig.overrides", what, (), "for example {'weight': 'int8:channel'}")
            else:
                yield from _wrong_specs(f"PTQConfig.overrides[{pattern!r}]", points or {})


def _wrong_specs(where: str, specs: Mapping[str, Spec | None]) -> Iterator[Problem]:
    for point, spec in specs.items():
        try:
            if spec is not None and spec != FLOAT:
                QuantSpec.parse(str(spec))
        except SpecError as error:
            yield Problem(f"{where}.{point}", str(error))


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
    sources = Sources({f"rules.{name}": "PTQConfig" for name in rules})
    with apart(model):
        modules, untouched = resolve_specs(rules, model, sources)
    missing = [row for row in untouched if row.reason == "no wrapper"]
    if config.strict and missing:
        what = ", ".join(f"{row.name or 'the model itself'} ({row.type})" for row in missing)
        raise PlanError([Problem("PTQConfig", f"strict, and there is no wrapper for {what}")])
    return wrap_model(model, {m.name: {p.name: p.quant_spec for p in m.points} for m in modules})


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
    failures = []
    for quantizer in waiting:
        try:
            quantizer.check()
        except LifecycleError as error:
            failures.append(str(error))
    if failures:
        shown = "\n  ".join(failures[:10])
        raise LifecycleError(f"cannot convert, {len(failures)} points are not ready:\n  {shown}")
    algorithm = ALGORITHMS.get(rounding)
    if not issubclass(algorithm, Rounder):
        raise LifecycleError(f"{rounding} does not round weights")
    rounders = {q.where: algorithm() for q in iter_quantizers(model)}
    setter = cast(RangeSetter, ALGORITHMS.get("ranges")())
    Walker(model, rounders, {q.where: setter for q in waiting}).run([], "parallel")
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
    token = PADDING.set(mask.to(torch.bool))
    try:
        yield
    finally:
        PADDING.reset(token)
