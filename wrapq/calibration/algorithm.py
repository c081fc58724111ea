"""What an algorithm declares, so that the plan can order and check a stack without knowing any algorithm by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from wrapq.calibration.graph import Graph
from wrapq.calibration.statistics import InputStatistics
from wrapq.calibration.surgery import Surgeon
from wrapq.observers.base import Observer
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec
from wrapq.registry import Registry
from wrapq.wrappers.model import Specs

Phase = Literal["transform", "range", "round", "correct"]
PHASES: tuple[Phase, ...] = ("transform", "range", "round", "correct")


RUNS = "batches"
"""What a transform needs that runs the model itself: `Surgeon.batches`."""


class NoOptions(BaseModel):
    """Options of an algorithm that has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Algorithm(ABC):
    """One stage of the stack. It never runs the model: it is given tensors and gives tensors back.

    Attributes:
        phase: where in the stack it belongs; transforms come before ranges, ranges before rounding, corrections last.
        handles: the role of the points it decides; `model` for a transform, which decides none.
        Options: the pydantic model of its options in a recipe.
        combines: how what it reports of parts of a weight (`wrapq.calibration.by_group`) becomes one figure, by name;
            the sum of them unless said here.
    """

    phase: ClassVar[Phase]
    handles: ClassVar[Literal["weight", "activation", "model"]]
    Options: ClassVar[type[BaseModel]] = NoOptions
    combines: ClassVar[Mapping[str, Callable[[Sequence[float]], float]]] = MappingProxyType({})

    def __init__(self, options: Any = None) -> None:
        self.options = options if options is not None else self.Options()

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics of a weight's input that it must be given, by the names of
        `wrapq.calibration.statistics.InputStatistics`. What the ranges of activations need, the observers of the specs
        say.
        """
        return ()


class Rounded(NamedTuple):
    """A weight's codes [N, K] in the grid of `qparams`, and figures worth keeping, such as the damping it took."""

    integers: Tensor
    qparams: QParams
    report: Mapping[str, float] = MappingProxyType({})


class Rounding(Algorithm):
    """Chooses the codes of weights, which are the integers themselves on an integer grid; each weight has exactly one.

    Its kinds are `Rounder` and `wrapq.calibration.blockwise.BlockRounder`.
    """

    phase = "round"
    handles = "weight"

    def unsupported(self, spec: QuantSpec) -> str | None:
        """Why weights of `spec` cannot be rounded with these options, or None when they can; asked by the plan."""
        return None


class Rounder(Rounding):
    """Chooses the codes of one weight at a time.

    Attributes:
        groups_at_once: where groups of rows have inputs of their own, it is given the weight as a whole and statistics
            with all groups in front, [G, ...]; else each group by itself (`wrapq.calibration.by_group`).
    """

    groups_at_once: ClassVar[bool] = False

    @abstractmethod
    def round(self, weight: Tensor, spec: QuantSpec, where: str, statistics: InputStatistics | None = None) -> Rounded:
        """The codes for `weight` [N, K], float; `where` names the point in errors.

        `statistics`, of what the weight is multiplied with, are there when `needs` names any.
        """

    def round_each(
        self, weight: Tensor, specs: Sequence[QuantSpec], where: str, statistics: InputStatistics | None = None
    ) -> list[Rounded]:
        """What `round` gives for each of `specs`, to the bit; for an algorithm that has work in common for them.

        Asked for the recipes of a sweep. A subclass that overrides `round` of such an algorithm overrides this too.
        """
        return [self.round(weight, spec, where, statistics) for spec in specs]


class Correction(NamedTuple):
    """What is added to the output of a module with a rounded weight: `bias` [N], and `x A^T B^T` for `a` [r, K] and
    `b` [N, r]; either may be absent."""

    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    report: Mapping[str, float] = MappingProxyType({})


class Corrector(Algorithm):
    """Makes good, beside a weight that is rounded already, some of what its rounding lost.

    Attributes:
        adds: what it gives; a weight gets each from one stage at most.
    """

    phase = "correct"
    handles = "weight"
    adds: ClassVar[Literal["bias", "low_rank"]]

    def takes(self, wrapper: str) -> bool:
        """Whether it corrects the weights of modules under the wrapper called so."""
        return True

    @abstractmethod
    def correct(self, weight: Tensor, error: Tensor, where: str, statistics: InputStatistics) -> Correction:
        """What to add for `weight` [N, K], float, of which what is computed with lacks `error` [N, K].

        `statistics` are those that `needs` names; raises `UnusableStatisticsError` where no data reached the weight.
        """

    def added_elements(self, shape: tuple[int, int]) -> int:
        """How many numbers, in the model's dtype, it adds to a weight [N, K]."""
        return 0


class RangeSetter(Algorithm):
    """Chooses the parameters of a static activation point from what its observer saw."""

    phase = "range"
    handles = "activation"

    @abstractmethod
    def choose(self, observer: Observer, where: str) -> QParams:
        """The parameters for the point `where`; raises `CalibrationError` when the data cannot be used."""


class Found(NamedTuple):
    """What a transform will change, in the order of the model, by names of its own choice (the producer of a feed, a
    stream); and what it could have changed and leaves alone, with the reason."""

    targets: tuple[str, ...]
    left: Mapping[str, str] = MappingProxyType({})


class Placed(NamedTuple):
    """A transform of a stack and what it will change."""

    transform: Transform
    targets: tuple[str, ...]


def scaled_by(before: Sequence[Placed]) -> frozenset[str]:
    """What the transforms `before` will have scaled."""
    return frozenset(name for its in before if its.transform.migrates for name in its.targets)


class Transform(Algorithm):
    """Changes the float model without changing its function. It is given no model, only who feeds whom in it and a
    surgeon whose every operation keeps the function.

    Attributes:
        migrates: it scales what linears read, so that two such transforms cannot share an input.
        band: how far it may move the model's outputs, relative to their norm; None, as far as rounding in the dtype of
            the model explains.
    """

    phase = "transform"
    handles = "model"
    migrates: ClassVar[bool] = False
    band: ClassVar[float | None] = None

    @abstractmethod
    def find(self, graph: Graph, specs: Specs) -> Found:
        """What there is to change; asked by the plan, on the model without weights."""

    def inputs(self, graph: Graph, target: str) -> tuple[str, ...]:
        """The modules whose inputs' statistics, as `needs` names them, it wants for `target`: a feed's readers."""
        return tuple(reader.module for reader in graph.by_producer[target].readers)

    def misplaced(self, graph: Graph, targets: Sequence[str], before: Sequence[Placed]) -> str | None:
        """Why it cannot change `targets` after the transforms `before`, or None when it can; asked by the plan."""
        return None

    def online(self, graph: Graph, targets: Sequence[str]) -> tuple[str, ...]:
        """The modules among `targets` that will change what comes to them at each forward: nothing can be moved into
        or out of these afterwards, and the runtime of an export must do as they do."""
        return ()

    @abstractmethod
    def apply(self, surgeon: Surgeon, target: str, statistics: Mapping[str, InputStatistics]) -> Mapping[str, float]:
        """Change `target`; returns figures worth keeping.

        Args:
            surgeon: with the graph, and the model as it is after the transforms before.
            target: one of those that `find` named.
            statistics: for each of `inputs`, what it is given as `needs` says, of the model as it is now; but for those
                to which no token came, such as an expert of a mixture. It is not called where none came to any.
        """


ALGORITHMS: Registry[type[Algorithm]] = Registry("algorithm", "wrapq.algorithms")
