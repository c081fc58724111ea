"""Rules become specs: each in its order patches the points of the modules it selects; every field keeps its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wrapq.calibration.blocks import Blocks
from wrapq.errors import Problem, nearest
from wrapq.quant.short_form import parse_fields
from wrapq.quant.spec import FLOAT
from wrapq.recipe.provenance import Origin
from wrapq.recipe.schema import Rule
from wrapq.resolve.selectors import Site, broken_patterns, explain_no_match, select
from wrapq.wrappers.base import Point


@dataclass
class Draft:
    """What the rules so far say of one point: the fields of its spec, and who said each."""

    fields: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def merge(self, patch: str | Mapping[str, Any], path: str, rule: str, sources: Sources) -> None:
        """Take in a patch that stands at `path`; a short form replaces everything, a mapping only its keys."""
        if isinstance(patch, str):
            self.fields.clear()
            self.sources.clear()
            patch = parse_fields(patch)
        for key, value in patch.items():
            self.fields[key] = value
            self.sources.pop(key, None)  # whoever spoke last comes last
            self.sources[key] = f"rule {rule}, {sources.of(f'{path}.{key}')}"


@dataclass(frozen=True)
class Sources:
    """Where each leaf of the recipe was set."""

    leaves: Mapping[str, Any]

    def of(self, path: str) -> str:
        """The file and line or override that set `path`, or what is nearest above or below it."""
        probe = path
        while probe:
            if probe in self.leaves:
                return str(self.leaves[probe])
            probe = probe.rpartition(".")[0]
        below = (source for leaf, source in self.leaves.items() if leaf.startswith(f"{path}."))
        return str(next(below, "the recipe"))

    def origins(self) -> tuple[Origin, ...]:
        """The preset files among the sources, by name."""
        found = {origin for source in self.leaves.values() if (origin := getattr(source, "origin", None))}
        return tuple(sorted(found, key=lambda origin: origin.preset))

    def where(self, path: str) -> str:
        """The source of `path`, then the path itself, as problems quote it."""
        return f"{self.of(path)}: {path}"


@dataclass
class Drafted:
    """The outcome of all rules.

    Attributes:
        points: for each site's name the draft of each point that some rule quantizes.
        left: for each site that a rule left float, that rule.
        selected: for each rule the sites it selects.
    """

    points: dict[str, dict[str, Draft]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    selected: dict[str, list[Site]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def draft_points(rules: Mapping[str, Rule], sites: Sequence[Site], blocks: Blocks, sources: Sources) -> Drafted:
    """Apply all rules in order; every rule without effect is among the problems."""
    drafted = Drafted()
    for name, rule in rules.items():
        broken = [Problem(sources.where(f"rules.{name}.match.name"), what) for what in broken_patterns(rule.match)]
        selected = [] if broken else select(rule.match, sites, blocks)
        drafted.selected[name] = selected
        drafted.problems += broken or _check_selection(name, rule, selected, sites, blocks, sources)
        for site in selected:
            if site.wrapper is not None:
                _apply(name, rule, site, drafted, sources)
    return drafted


def _apply(name: str, rule: Rule, site: Site, drafted: Drafted, sources: Sources) -> None:
    if not rule.quantize:
        drafted.points.pop(site.name, None)
        drafted.left[site.name] = name
        return
    points = drafted.points.setdefault(site.name, {})
    if rule.replace:
        points.clear()
    for point in site.points:
        for patch, path in _patches(name, rule, point):
            if patch == FLOAT:
                points.pop(point.name, None)
            else:
                points.setdefault(point.name, Draft()).merge(patch, path, name, sources)


def _patches(name: str, rule: Rule, point: Point) -> Iterator[tuple[str | Mapping[str, Any], str]]:
    """What the rule says of a point, the general before the particular, with its path."""
    if point.role == "activation" and rule.activations is not None:
        yield rule.activations, f"rules.{name}.activations"
    if point.name in ("weight", "input", "output") and (patch := getattr(rule, point.name)) is not None:
        yield patch, f"rules.{name}.{point.name}"
    if point.name in rule.points:
        yield rule.points[point.name], f"rules.{name}.points.{point.name}"


def _check_selection(
    name: str, rule: Rule, selected: Sequence[Site], sites: Sequence[Site], blocks: Blocks, sources: Sources
) -> Iterator[Problem]:
    if not selected:
        if not rule.optional:
            reason, close = explain_no_match(rule.match, sites, blocks)
            path = f"rules.{name}.match"
            # the first word of the reason is the key at fault, which may have another source than its neighbours
            source = sources.of(f"{path}.{reason.partition(' ')[0]}")
            where = f"{source}: {path}"
            yield Problem(where, reason, close, "correct it, or set optional: true in the rule")
        return
    if not rule.quantize:
        return
    wrapped = [site for site in selected if site.wrapper is not None]
    if not wrapped:
        kinds = ", ".join(sorted({type(site.module).__name__ for site in selected}))
        yield Problem(sources.where(f"rules.{name}.match"), f"matches only modules that have no wrapper: {kinds}")
        return
    known = list(dict.fromkeys(point.name for site in wrapped for point in site.points))
    said = [key for key in ("weight", "input", "output") if getattr(rule, key) is not None]
    for path, key in [(key, key) for key in said] + [(f"points.{key}", key) for key in rule.points]:
        if key not in known:
            what = f"none of the {len(wrapped)} modules it matches has a point {key!r}"
            yield Problem(sources.where(f"rules.{name}.{path}"), what, nearest(key, known))
    if not said and not rule.points and rule.activations is None and not rule.replace:
        yield Problem(sources.where(f"rules.{name}"), "the rule selects modules but says nothing of them")
