"""Assignments: which algorithm finalizes which point, from the stages of a plan or from a stack of the Python API."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from wrapq.algorithms.base import BLOCK, Algorithm, BlockRounder, Corrector, RangeSetter, Rounder, Rounding
from wrapq.algorithms.ranges import Ranges
from wrapq.algorithms.rtn import RTN
from wrapq.algorithms.transform import Transform
from wrapq.calibration.grouped_conv import unsupported
from wrapq.errors import PlanError, Problem
from wrapq.statistics.cache import CachedPoint
from wrapq.statistics.input import MODES
from wrapq.wrappers.model import iter_wrapped
from wrapq.wrappers.quantizer import Quantizer, WeightQuantizer


@dataclass(frozen=True)
class Assignments:
    """The algorithms of each point of a model, by the point's full name: what rounds each weight, what chooses the
    range of each static activation, and what corrects each weight after it is rounded, in order."""

    rounders: Mapping[str, Rounding] = field(default_factory=dict)
    range_setters: Mapping[str, RangeSetter] = field(default_factory=dict)
    correctors: Mapping[str, Sequence[Corrector]] = field(default_factory=dict)
    _needs: dict[str, frozenset[str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_stages(cls, stages: Iterable[tuple[Algorithm, Iterable[str]]]) -> Assignments:
        """Each stage's algorithm for the points that are its targets; a later rounder or range setter replaces an
        earlier one, while correctors add up."""
        rounders: dict[str, Rounding] = {}
        range_setters: dict[str, RangeSetter] = {}
        correctors: dict[str, list[Corrector]] = {}
        for algorithm, targets in stages:
            match algorithm:
                case Rounder() | BlockRounder():
                    rounders |= dict.fromkeys(targets, algorithm)
                case RangeSetter():
                    range_setters |= dict.fromkeys(targets, algorithm)
                case Corrector():
                    for target in targets:
                        correctors.setdefault(target, []).append(algorithm)
                case Transform():  # which changes the float model before anything is finalized
                    pass
                case _:
                    raise TypeError(f"{type(algorithm).__name__} is no kind of algorithm")
        return cls(rounders, range_setters, correctors)

    @classmethod
    def from_stack(cls, model: nn.Module, stack: Iterable[Algorithm]) -> Assignments:
        """A stack that names no targets, for every point of a wrapped model that each algorithm can take.

        Weights that multiply no matrix are rounded to nearest where the rounder needs the statistics of an input, and
        activations have the range of their observer where no algorithm sets it. Raises `PlanError` where a rounder
        cannot round some weights to their specs.
        """
        stages = [(algorithm, list(_targets(model, algorithm))) for algorithm in (RTN(), Ranges(), *stack)]
        assignments, problems = cls.from_stages(stages), []
        for _, module in iter_wrapped(model):
            if (point := module.weight_quantizer) is not None:
                rows, groups = len(module.float_weight()), module.wrapper.groups(module)
                if reason := unsupported(assignments.rounders[point.where], point.spec, rows, groups):
                    problems.append(Problem("", "calibrate", f"{point.where}, {point.spec}: {reason}"))
        if problems:
            raise PlanError(problems)
        return assignments

    def of(self, point: Quantizer) -> tuple[Algorithm, ...]:
        """The algorithms of a point, in order; none of a dynamic one that no stage has."""
        if isinstance(point, WeightQuantizer):
            return (self.rounders[point.where], *self.correctors.get(point.where, ()))
        setter = self.range_setters.get(point.where)
        return () if setter is None else (setter,)

    def needs(self, weight: WeightQuantizer) -> frozenset[str]:
        """The statistics of its input that the algorithms of a weight must be given."""
        if (needs := self._needs.get(weight.where)) is None:
            needs = frozenset(need for algorithm in self.of(weight) for need in algorithm.needs) - {BLOCK}
            self._needs[weight.where] = needs
        return needs

    def needs_data(self, point: Quantizer) -> bool:
        """Whether the point is finalized from data."""
        if not isinstance(point, WeightQuantizer):
            return not point.spec.dynamic
        return bool(self.needs(point)) or self.by_block(point)

    def cached_point(self, point: Quantizer) -> CachedPoint:
        """What the statistics of a point are known by."""
        algorithms = self.of(point)
        named = [(type(a).__module__, type(a).__qualname__, a.options.model_dump(mode="json")) for a in algorithms]
        needs = frozenset(need for algorithm in algorithms for need in algorithm.needs)
        modes = " ".join(["", *sorted(needs & MODES)])
        kinds = {part: f"{part}{modes}" for part in sorted(needs - MODES)}
        return CachedPoint(point.where, [str(point.spec), named], kinds or {"observer": f"observer {point.spec}"})

    def by_block(self, point: Quantizer) -> bool:
        """Whether the point is a weight that is rounded together with others of its block."""
        return isinstance(self.rounders.get(point.where), BlockRounder)


def _targets(model: nn.Module, algorithm: Algorithm) -> Iterator[str]:
    for _, module in iter_wrapped(model):
        for point in module.point_quantizers().values():
            if not isinstance(point, WeightQuantizer):
                takes = algorithm.handles == "activation"
            elif isinstance(algorithm, Corrector):
                takes = module.wrapper.multiplies(module) and algorithm.takes(module.wrapper.__name__)
            else:
                takes = algorithm.handles == "weight" and (module.wrapper.multiplies(module) or not algorithm.needs)
            if takes:
                yield point.where
