"""Which modules a rule means."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from wrapq.errors import nearest
from wrapq.graph.blocks import Blocks
from wrapq.graph.mixtures import find_routers, holds_experts
from wrapq.recipe.schema import Match
from wrapq.wrappers.base import Point, Wrapper
from wrapq.wrappers.wrapper_registry import WRAPPERS

GATE, _LINEAR = "Gate", "Linear"
"""Kinds of modules that a rule's `type` may name."""


@dataclass(frozen=True)
class Site:
    """A module that rules may select.

    Attributes:
        name: the module's full name.
        module: the module itself, on the meta device.
        wrapper: the wrapper for it, or None.
        block: the index of the repeated block it is in, or None.
        is_router: whether it is a linear that chooses among experts.
        tower: the part beside the language model that it lies in, as found for recipes; empty for others.
    """

    name: str
    module: nn.Module
    wrapper: type[Wrapper] | None
    block: int | None
    is_router: bool = False
    tower: str = ""

    @property
    def points(self) -> tuple[Point, ...]:
        """The points that the wrapper can put into this very module: none for a weight that it does not have."""
        points = self.wrapper.points if self.wrapper else ()
        if self.is_router and type(self.module).forward is not nn.Linear.forward:
            points = tuple(p for p in points if p.name != "output")  # which is what it chose, not one tensor
        return tuple(p for p in points if p.role != "weight" or self.module._parameters.get(p.name) is not None)

    @property
    def operands(self) -> tuple[str, ...]:
        """The points that a matrix product or a convolution reads."""
        return self.wrapper.operands(self.module) if self.wrapper else ()

    @property
    def types(self) -> frozenset[str]:
        """The names by which a rule's `type` may mean it: its class and that one's bases, its wrapper's kind; of a gate
        `Gate` in place of `Linear`; `Linear` of experts in one tensor too, as that is what they are."""
        bases = {base.__name__ for base in type(self.module).__mro__ if base not in (nn.Module, object)}
        names = bases | ({self.wrapper.kind} if self.wrapper else {_LINEAR} if self.holds_experts else set())
        return frozenset(names - {_LINEAR} | {GATE} if self.is_gate else names)

    @property
    def holds_experts(self) -> bool:
        """Whether it is the experts of a mixture in one tensor, which are not known to be linears of their own."""
        return self.wrapper is None and holds_experts(self.name, self.module)

    @property
    def is_gate(self) -> bool:
        """Whether it is a router, or a linear that gives one number for each token, as the gate of a shared expert and
        heads that score do. It weighs all that a token gets and has few weights, so that it is left where routers are.
        """
        wrapper = self.wrapper
        if wrapper is None or wrapper.kind != _LINEAR:
            return False
        return self.is_router or wrapper.width(self.module, "output") == 1


def find_sites(model: nn.Module, blocks: Blocks, towers: Sequence[str] = ()) -> list[Site]:
    """Every module of `model` in order, containers included; `towers` are the parts beside its language model."""
    routers = frozenset(find_routers(model))
    sites = []
    for name, module in model.named_modules():
        wrapper = None if isinstance(module, nn.ModuleList) else WRAPPERS.find(module)
        tower = next((tower for tower in towers if f"{name}.".startswith(f"{tower}.")), "")
        sites.append(Site(name, module, wrapper, blocks.index(name), name in routers, tower))
    return sites


def select(match: Match, sites: Sequence[Site], blocks: Blocks) -> list[Site]:
    """The sites that fit everything `match` says; one that says nothing fits all. Those beside the language model fit
    only names that fit none in it."""
    names, types = _listed(match.name), _listed(match.type)
    beside = [p for p in names if not any(name_fits(p, site.name) for site in sites if not site.tower)]
    layers = None if match.layers is None else layer_range(match.layers, blocks.count)
    return [
        site
        for site in sites
        if (not (names or site.tower) or any(name_fits(p, site.name) for p in (beside if site.tower else names)))
        and (not types or any(fnmatch.fnmatchcase(name, p) for p in types for name in site.types))
        and (layers is None or site.block in layers)
    ]


def name_fits(pattern: str, name: str) -> bool:
    """`re:` patterns match the whole name; the others are globs over the whole name, or over its last parts."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def broken_patterns(match: Match) -> Iterator[str]:
    """What is wrong with each `re:` pattern that is no regular expression."""
    for pattern in _listed(match.name):
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            yield f"{pattern!r} is no regular expression: {error}"


def layer_range(layers: int | str, count: int) -> range:
    """The block indices that `3`, `-1` (the last), `0:8` or `-2:` mean among `count` blocks."""
    if isinstance(layers, int) or ":" not in layers:
        return range(count)[int(layers) : int(layers) + 1 or None]
    start, _, stop = layers.partition(":")
    return range(count)[slice(int(start) if start else None, int(stop) if stop else None)]


def explain_no_match(match: Match, sites: Sequence[Site], blocks: Blocks) -> tuple[str, str, tuple[str, ...]]:
    """The key of `match` that fits nothing, empty where it is all of them together; why; the nearest valid names."""
    if match.layers is not None and not layer_range(match.layers, blocks.count):
        last = f"0 to {blocks.count - 1}" if blocks.count else "none"
        return "layers", f"layers {match.layers} is outside the model's {blocks.count} blocks ({last})", ()
    for pattern in _listed(match.name):
        if not any(name_fits(pattern, site.name) for site in sites):
            return "name", f"name {pattern!r} matches no module", _nearest_names(pattern, sites)
    for pattern in _listed(match.type):
        if not any(fnmatch.fnmatchcase(name, pattern) for site in sites for name in site.types):
            known = sorted({name for site in sites if site.wrapper for name in site.types})
            return "type", f"type {pattern!r} matches no module", nearest(pattern, known)
    return "", "no module fits all of its name, type and layers together", ()


def _nearest_names(pattern: str, sites: Sequence[Site]) -> tuple[str, ...]:
    """Names as long as the pattern: for `*.mlp.dwon_proj` the ends of names, `mlp.down_proj`."""
    bare = pattern.removeprefix("re:").replace("\\.", ".").strip("*.^$")
    depth = bare.count(".") + 1
    ends = dict.fromkeys(".".join(site.name.split(".")[-depth:]) for site in sites if site.name)
    prefix = "*." if pattern.startswith("*") else ""
    return tuple(prefix + name for name in nearest(bare, ends))


def _listed(value: str | Iterable[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
