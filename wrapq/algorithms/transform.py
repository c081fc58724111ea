"""The contract of a transform: a change of the float model, before anything is quantized, that keeps its function."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from wrapq.algorithms.base import Algorithm
from wrapq.statistics.input import InputStatistics

if TYPE_CHECKING:
    from wrapq.graph.dataflow import Graph
    from wrapq.graph.rewriter import GraphRewriter
    from wrapq.wrappers.model import Specs

BATCHES = "batches"
"""In `needs`: the transform runs the model itself, on `GraphRewriter.batches`."""

Statistics = Mapping[str, InputStatistics]
"""Input statistics by the name of the module whose input they are of."""


class Targets(NamedTuple):
    """The places that a transform can change, and those that it cannot.

    Attributes:
        names: in the order in which they are to be changed. What a name stands for is up to the transform, such as an
            edge by its producer or a residual stream by its name.
        skipped: the reason for each place that has to stay as it is.
    """

    names: tuple[str, ...]
    skipped: Mapping[str, str] = MappingProxyType({})

    @classmethod
    def where_none(cls, reasons: Mapping[str, str | None]) -> Targets:
        """The names whose reason to be skipped is None; the others are skipped."""
        skipped = {name: reason for name, reason in reasons.items() if reason is not None}
        return cls(tuple(name for name in reasons if name not in skipped), skipped)


class PlannedTransform(NamedTuple):
    """A transform of a stack and its targets."""

    transform: Transform
    targets: tuple[str, ...]


def scaled_targets(before: Sequence[PlannedTransform]) -> frozenset[str]:
    """The targets of those of the transforms `before` that scale inputs."""
    return frozenset(name for planned in before if planned.transform.migrates for name in planned.targets)


class Transform(Algorithm):
    """Changes the float model without changing its function.

    A transform is not given the model. It names its targets in a graph, which the plan traces without weights
    (`find_targets`), and changes them one by one through a rewriter, whose operations keep the function (`apply`). The
    words are those of `wrapq.graph`: a *channel edge* is a *producer*, whose weight makes channels, and all *consumers*
    that multiply them; only channels that the edge owns may be changed, as nothing else sees those. After each
    transform the outputs are compared, and everything is undone where they moved. All there is to write:

        class EvenOptions(Options):
            power: float = Field(0.5, ge=0, le=1, description="Of the largest input, by which channels are divided.")

        @ALGORITHMS.register("even")
        class Even(Transform):
            Options = EvenOptions
            options: EvenOptions
            migrates = True

            @property
            def needs(self):  # statistics of the inputs of the modules that `inputs` names, here the consumers
                return ("absmax",)

            def find_targets(self, graph, specs):
                norms = [edge for edge in graph.edges if edge.layer.kind == "norm"]
                return Targets.where_none({edge.producer: unscalable(edge, graph) for edge in norms})

            def apply(self, rewriter, target, statistics):
                edge = rewriter.graph.edge(target)
                largest = largest_per_channel(edge, {name: s.get("absmax", name) for name, s in statistics.items()})
                factors = safe_factors(largest**self.options.power, edge)
                rewriter.scale(edge, factors)
                return {"largest_factor": float(factors.amax())}

    `unscalable`, `largest_per_channel` and `safe_factors` are in `wrapq.algorithms.scaling`.

    Attributes:
        migrates: it scales the inputs of linears, so that two such transforms cannot share an input.
        tolerance: how far it may move the model's outputs, relative to their norm; None, as far as rounding in the
            dtype of the model explains.
        offline: the option by which it changes nothing at each forward, for targets that cannot, as `OPTION=VALUE`.
    """

    kind = "transform"
    phase = "transform"
    handles = "model"
    migrates: ClassVar[bool] = False
    tolerance: ClassVar[float | None] = None
    offline: ClassVar[str] = ""

    @abstractmethod
    def find_targets(self, graph: Graph, specs: Specs) -> Targets:
        """The targets in a model whose points will be quantized as `specs` say; called by the plan, without weights."""

    def inputs(self, graph: Graph, target: str) -> tuple[str, ...]:
        """The modules of whose inputs `apply` gets the statistics in `needs`: the consumers of the edge `target`."""
        return tuple(consumer.module for consumer in graph.edge(target).consumers)

    def order_problem(self, graph: Graph, targets: Sequence[str], before: Sequence[PlannedTransform]) -> str | None:
        """Why `targets` cannot be changed after the transforms `before`, or None when they can; called by the plan."""
        return None

    def folded(self, graph: Graph, targets: Sequence[str]) -> tuple[str, ...] | None:
        """The norms that may only normalize where it changes `targets`; None for what does not care; called by the
        plan."""
        return None

    def needless(self, graph: Graph, targets: Sequence[str], after: Sequence[PlannedTransform]) -> Mapping[str, str]:
        """Those of `targets` that the transforms `after` make no use of, with the reason; called by the plan."""
        return {}

    def online(self, graph: Graph, targets: Sequence[str]) -> tuple[str, ...]:
        """The modules whose inputs are changed at each forward from then on: later transforms cannot move anything
        across that, and the runtime of an export must do the same."""
        return ()

    def hadamard(self, graph: Graph, targets: Sequence[str]) -> Mapping[str, int]:
        """Those of `online` whose input a Hadamard matrix with signs rotates, which some formats have a word for, with
        how many channels it rotates at a time, each block alike."""
        return {}

    @abstractmethod
    def apply(self, rewriter: GraphRewriter, target: str, statistics: Statistics) -> Mapping[str, float]:
        """Change `target`; returns figures to track.

        Args:
            rewriter: of the model as it is after the transforms before, with its graph and specs.
            target: one of the names that `find_targets` gave.
            statistics: for each of `inputs` the statistics in `needs`, of the model as it is now. Modules that no token
                reached, such as an expert of a mixture, are absent; where no token reached any, it is not called.
        """
