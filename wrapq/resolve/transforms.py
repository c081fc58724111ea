"""The transforms of a stack: their targets and conflicts, found from the model without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn

from wrapq.algorithms.transform import PlannedTransform, Targets, Transform
from wrapq.errors import ModelError, Problem, and_more
from wrapq.graph.dataflow import Graph, find_graph
from wrapq.graph.online import after_online
from wrapq.wrappers.model import Specs


class _Planned(NamedTuple):
    """A planned stage, the modules whose inputs it looks at, and those whose inputs it changes at each forward."""

    planned: PlannedTransform
    inputs: frozenset[str]
    online: frozenset[str]


@dataclass
class Transforms:
    """The transforms of one stack, planned in the order in which they will run.

    Attributes:
        model: the model, on the meta device.
        specs: what is quantized in it.
        inputs: arguments of one small forward; None for a language model's.
        notes: the places that transforms skip, and why.
    """

    model: nn.Module
    specs: Specs
    inputs: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    _before: dict[str, _Planned] = field(default_factory=dict)
    """By stage what is planned already."""
    _left: Graph | None = None
    """The graph as the stages planned so far leave it."""

    @cached_property
    def graph(self) -> Graph:
        """The model's channel edges and residual streams; raises `ModelError` where it cannot be traced."""
        return find_graph(self.model, self.inputs)

    def plan(
        self,
        stage: str,
        name: str,
        transform: Transform,
        after: Sequence[Transform],
        allowed: frozenset[str] | None = None,
        source: str = "",
    ) -> tuple[tuple[str, ...], Mapping[str, int | None], list[Problem]]:
        """For the transform called `name` in a stage, after the stages planned before: its targets, the modules whose
        inputs it changes at each forward, with how many channels a Hadamard matrix rotates if that is what it does, and
        its problems.

        Args:
            after: the transforms that come later in the stack.
            allowed: the modules that the rules of the stage match; None allows all.
            source: where the stage was set.
        """
        try:
            graph = self._left or self.graph
            targets = transform.find_targets(graph, self.specs)
            later = [PlannedTransform(each, each.find_targets(graph, self.specs).names) for each in after]
        except ModelError as error:
            return (), {}, [Problem(source, f"stack.{stage}", f"{name} cannot follow this model: {error}")]
        if allowed is not None:
            names = tuple(t for t in targets.names if allowed & {t, *transform.inputs(graph, t)})
            targets = targets._replace(names=names)
        needless = transform.needless(graph, (*targets.names, *targets.skipped), later)
        used = targets._replace(names=tuple(name for name in targets.names if name not in needless))
        reasons: dict[str, list[str]] = {}
        for place, reason in {**targets.skipped, **needless}.items():
            reasons.setdefault(reason, []).append(place)
        for reason, places in reasons.items():
            self.notes.append(f"{stage}: {name} leaves {and_more(places)} alone: {reason}")
        if needless and not used.names:
            return (), {}, []
        problems = list(self._problems(stage, name, transform, used, graph, source))
        online = {**dict.fromkeys(transform.online(graph, used.names)), **transform.hadamard(graph, used.names)}
        self._left = after_online(graph, online, stage)
        return used.names, online, problems

    def _problems(
        self, stage: str, name: str, transform: Transform, targets: Targets, graph: Graph, source: str
    ) -> Iterator[Problem]:
        path = f"stack.{stage}"
        if not targets.names:
            reasons = "; ".join(list(dict.fromkeys(targets.skipped.values()))[:3]) or "the model has no place for it"
            remedy = f"remove the stage with ~stack.{stage}"
            yield Problem(source, path, f"{name} has nothing to do: {reasons}", (), remedy)
        planned = [each.planned for each in self._before.values()]
        if (reason := transform.order_problem(graph, targets.names, planned)) is not None:
            yield Problem(source, path, f"{name} cannot run there: {reason}")
        inputs = frozenset(i for t in targets.names for i in transform.inputs(graph, t))
        online = frozenset(transform.online(graph, targets.names))
        for name_before, other in self._before.items():
            before = other.planned.transform
            mine = inputs if before.migrates else online if type(before) is type(transform) else frozenset()
            if not transform.migrates and (both := sorted(other.online & mine)):
                what = f"{stage} would change the input of {both[0]}, which {name_before} changes at each forward"
                remedy = f"name {stage} before {name_before}, or give each stage its own rules"
                yield Problem(source, path, what, (), remedy)
            if before.migrates and transform.migrates and (both := sorted(other.inputs & inputs)):
                what = f"{name_before} and {stage} would both scale the input of {both[0]}"
                yield Problem(source, path, what, (), "give each stage its own rules: stack.NAME.rules=[...]")
        self._before[stage] = _Planned(PlannedTransform(transform, targets.names), inputs, online)
