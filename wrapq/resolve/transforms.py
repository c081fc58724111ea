"""The transforms of a stack: their targets and conflicts, found from the model without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from wrapq.algorithms.transform import PlannedTransform, Targets, Transform
from wrapq.errors import ModelError, Problem, and_more
from wrapq.graph.dataflow import Graph, find_graph
from wrapq.wrappers.model import Specs


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
    _before: dict[str, tuple[PlannedTransform, frozenset[str]]] = field(default_factory=dict)
    """By stage what is planned already, and the modules whose inputs it looks at."""

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
    ) -> tuple[tuple[str, ...], list[Problem]]:
        """The targets of the transform called `name` in a stage, and its problems, after the stages planned before.

        Args:
            after: the transforms that come later in the stack.
            allowed: the modules that the rules of the stage match; None allows all.
            source: where the stage was set.
        """
        try:
            targets = transform.find_targets(self.graph, self.specs)
            later = [PlannedTransform(each, each.find_targets(self.graph, self.specs).names) for each in after]
        except ModelError as error:
            return (), [Problem(source, f"stack.{stage}", f"{name} cannot follow this model: {error}")]
        if allowed is not None:
            names = tuple(t for t in targets.names if allowed & {t, *transform.inputs(self.graph, t)})
            targets = targets._replace(names=names)
        needless = transform.needless(self.graph, targets.names, later)
        used = targets._replace(names=tuple(name for name in targets.names if name not in needless))
        reasons: dict[str, list[str]] = {}
        for place, reason in (*targets.skipped.items(), *needless.items()):
            reasons.setdefault(reason, []).append(place)
        for reason, places in reasons.items():
            self.notes.append(f"{stage}: {name} leaves {and_more(places)} alone: {reason}")
        if needless and not used.names:
            return (), []
        return used.names, list(self._problems(stage, name, transform, used, source))

    def _problems(
        self, stage: str, name: str, transform: Transform, targets: Targets, source: str
    ) -> Iterator[Problem]:
        path = f"stack.{stage}"
        if not targets.names:
            reasons = "; ".join(list(dict.fromkeys(targets.skipped.values()))[:3]) or "the model has no place for it"
            remedy = f"remove the stage with ~stack.{stage}"
            yield Problem(source, path, f"{name} has nothing to do: {reasons}", (), remedy)
        before = [planned for planned, _ in self._before.values()]
        if (reason := transform.order_problem(self.graph, targets.names, before)) is not None:
            yield Problem(source, path, f"{name} cannot run there: {reason}")
        inputs = frozenset(i for t in targets.names for i in transform.inputs(self.graph, t))
        online = frozenset(transform.online(self.graph, targets.names))
        for name_before, (other, _) in self._before.items():
            changed = frozenset(other.transform.online(self.graph, other.targets))
            both_rotate = not transform.migrates and not other.transform.migrates
            if both := sorted(changed & (online if both_rotate else inputs)):
                what = f"{stage} would change the input of {both[0]}, which {name_before} changes at each forward"
                remedy = f"name {stage} before {name_before}, or give each stage its own rules"
                yield Problem(source, path, what, (), remedy)
        for name_before, (other, other_inputs) in self._before.items() if transform.migrates else ():
            if other.transform.migrates and (both := sorted(other_inputs & inputs)):
                what = f"{name_before} and {stage} would both scale the input of {both[0]}"
                yield Problem(source, path, what, (), "give each stage its own rules: stack.NAME.rules=[...]")
        self._before[stage] = PlannedTransform(transform, targets.names), inputs
