"""The transforms of a stack: what each will change, and what cannot work, found from the model without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from wrapq.calibration.algorithm import Found, Placed, Transform
from wrapq.calibration.graph import Graph, find_graph
from wrapq.errors import Problem
from wrapq.wrappers.model import Specs


@dataclass
class Transforms:
    """The transforms of one stack, asked in the order in which they will run.

    Attributes:
        model: the model, on the meta device.
        specs: what is quantized in it.
        inputs: arguments of one small forward; None for a language model's.
        notes: what was left alone, and why.
    """

    model: nn.Module
    specs: Specs
    inputs: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    _before: list[tuple[str, Transform, tuple[str, ...], frozenset[str]]] = field(default_factory=list)

    @cached_property
    def graph(self) -> Graph:
        """Who feeds whom; raises `ModelError` where the model cannot be followed."""
        return find_graph(self.model, self.inputs)

    def ask(self, stage: str, name: str, transform: Transform, allowed: frozenset[str] | None) -> Found:
        """What `transform` will change among the `allowed` modules, all of them if None; raises `ModelError`."""
        found = transform.find(self.graph, self.specs)
        if allowed is not None:
            kept = tuple(t for t in found.targets if allowed & {t, *transform.inputs(self.graph, t)})
            found = Found(kept, found.left)
        reasons: dict[str, list[str]] = {}
        for what, why in found.left.items():
            reasons.setdefault(why, []).append(what)
        for why, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.notes.append(f"{stage}: {name} leaves {names[0]}{more} alone: {why}")
        return found

    def check(self, stage: str, name: str, transform: Transform, found: Found, where: str) -> Iterator[Problem]:
        """What is wrong with the stage, given those before it."""
        if not found.targets:
            reasons = "; ".join(list(dict.fromkeys(found.left.values()))[:3]) or "the model has no place for it"
            remedy = f"remove the stage with ~stack.{stage}"
            yield Problem(where, f"{name} has nothing to do: {reasons}", (), remedy)
        placed = [Placed(before, targets) for _, before, targets, _ in self._before]
        if (reason := transform.misplaced(self.graph, found.targets, placed)) is not None:
            yield Problem(where, f"{name} cannot run there: {reason}")
        inputs = frozenset(i for t in found.targets for i in transform.inputs(self.graph, t))
        online = frozenset(transform.online(self.graph, found.targets))
        for other, before, targets, _ in self._before:
            its = frozenset(before.online(self.graph, targets))
            if both := sorted(its & (inputs if transform.migrates else online)):
                what = f"{stage} would change the input of {both[0]}, which {other} turns at each forward"
                yield Problem(where, what, (), f"name {stage} before {other}, or give each stage its own rules")
        for other, before, _, its in self._before if transform.migrates else ():
            if before.migrates and (both := sorted(its & inputs)):
                what = f"{other} and {stage} would both scale the input of {both[0]}"
                remedy = "give each stage its own rules: stack.NAME.rules=[...]"
                yield Problem(where, what, (), remedy)
        self._before.append((stage, transform, found.targets, inputs))
