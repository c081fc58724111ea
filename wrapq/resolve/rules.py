"""Rules become specs: each in its order patches the points of the modules it selects; every field keeps its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wrapq.errors import Problem, Unread, nearest
from wrapq.graph.blocks import Blocks
from wrapq.quant.short_form import parse_fields
from wrapq.quant.spec import FLOAT
from wrapq.recipe.provenance import Origin, Provenance
from wrapq.recipe.schema import Rule
from wrapq.resolve.selectors import Site, broken_patterns, explain_no_match, select
from wrapq.wrappers.base import Point


@dataclass
class Draft:
    """What the rules so far say of one point: the fields of its spec, and who set each."""

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
    """Where each leaf of the recipe was set, by dotted path."""

    leaves: Mapping[str, Provenance]

    def find(self, path: str) -> Provenance | None:
        """What set `path`, or what is nearest above or below it."""
        probe = path
        while probe:
            if probe in self.leaves:
                return self.leaves[probe]
            probe = probe.rpartition(".")[0]
        return next((source for leaf, source in self.leaves.items() if leaf.startswith(f"{path}.")), None)

    def of(self, path: str) -> str:
        """The file and line or override that set `path`."""
        return str(self.find(path) or "the recipe")

    def origins(self) -> tuple[Origin, ...]:
        """The preset files among the sources, by name."""
        found = {source.origin for source in self.leaves.values() if source.origin}
        return tuple(sorted(found, key=lambda origin: origin.preset))

    def problem(self, path: str, what: str, nearest: tuple[str, ...] = (), remedy: str = "") -> Problem:
        """What is wrong with the key at `path`."""
        return Problem(self.of(path), path, what, nearest, remedy)

    def unread(self, path: str, what: str, remedy: str) -> Unread:
        """Why nothing reads the key at `path`."""
        source = self.find(path)
        override = source.override if source is not None and not source.file else ""
        return Unread(self.of(path), path, what, (), remedy, override)


@dataclass
class Drafted:
    """The outcome of all rules.

    Attributes:
        points: for each site's name the draft of each point that some rule quantizes.
        left: for each site that a rule left float, that rule.
        parts: for each site that a rule hands to PT2E, that rule.
        selected: for each rule the sites it selects.
    """

    points: dict[str, dict[str, Draft]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    selected: dict[str, list[Site]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def draft_points(rules: Mapping[str, Rule], sites: Sequence[Site], blocks: Blocks, sources: Sources) -> Drafted:
    """Apply all rules in order; every rule without effect is among the problems."""
    drafted = Drafted()
    for name, rule in rules.items():
        broken = [sources.problem(f"rules.{name}.match.name", what) for what in broken_patterns(rule.match)]
        selected = [] if broken else select(rule.match, sites, blocks)
        drafted.selected[name] = selected
        drafted.problems += broken or _check_selection(name, rule, selected, sites, blocks, sources)
        if rule.by is not None:
            _hand_over(name, selected, drafted, sources)
            continue
        for site in selected:
            part = next((p for p in drafted.parts if lies_in(site.name, p)), None)
            if part is not None:
                if rule.quantize and not any(True for point in site.points for _ in _patches(name, rule, site, point)):
                    continue
                _take_back(name, site, part, drafted, sources)
            if site.wrapper is not None or site.holds_experts:
                _apply(name, rule, site, drafted, sources)
    return drafted


def lies_in(name: str, part: str) -> bool:
    """Whether the module `name` is the module `part` or lies in it."""
    return f"{name}.".startswith(f"{part}." if part else "")


def _hand_over(name: str, selected: Sequence[Site], drafted: Drafted, sources: Sources) -> None:
    """Give the sites to PT2E with all that lies in them, whatever earlier rules said of it."""
    for site in selected:
        outer = next((part for part in drafted.parts if part != site.name and lies_in(site.name, part)), None)
        if outer is not None:
            what = (
                f"{site.name} lies in {outer or 'the model'}, which rule {drafted.parts[outer]} hands to PT2E already"
            )
            drafted.problems.append(sources.problem(f"rules.{name}.match", what, (), "name one of the two"))
            continue
        for table in (drafted.points, drafted.left, drafted.parts):
            for inner in [each for each in table if lies_in(each, site.name)]:
                table.pop(inner)
        drafted.parts[site.name] = name


def _take_back(name: str, site: Site, part: str, drafted: Drafted, sources: Sources) -> None:
    """A later rule wins a whole part; of what lies in one, PT2E's quantizer alone decides."""
    if site.name == part:
        drafted.parts.pop(part)
        return
    what = f"{site.name} lies in {part or 'the model'}, which rule {drafted.parts[part]} hands to PT2E as a whole"
    remedy = "name this rule before that one, or match other modules"
    drafted.problems.append(sources.problem(f"rules.{name}.match", what, (), remedy))


def _apply(name: str, rule: Rule, site: Site, drafted: Drafted, sources: Sources) -> None:
    if not rule.quantize:
        drafted.points.pop(site.name, None)
        drafted.left[site.name] = name
        return
    points = drafted.points.setdefault(site.name, {})
    if rule.replace:
        points.clear()
    for point in site.points:
        for patch, path in _patches(name, rule, site, point):
            if patch == FLOAT:
                points.pop(point.name, None)
            else:
                points.setdefault(point.name, Draft()).merge(patch, path, name, sources)


def _patches(name: str, rule: Rule, site: Site, point: Point) -> Iterator[tuple[str | Mapping[str, Any], str]]:
    """What the rule says of a point, the general before the particular, with its path."""
    if point.role == "activation" and rule.activations is not None:
        yield rule.activations, f"rules.{name}.activations"
    if point.name in site.operands and rule.activation is not None:
        yield rule.activation, f"rules.{name}.activation"
    if point.name in ("weight", "input", "output") and (patch := getattr(rule, point.name)) is not None:
        yield patch, f"rules.{name}.{point.name}"
    if point.name in rule.points:
        yield rule.points[point.name], f"rules.{name}.points.{point.name}"


def _check_selection(
    name: str, rule: Rule, selected: Sequence[Site], sites: Sequence[Site], blocks: Blocks, sources: Sources
) -> Iterator[Problem]:
    if not selected:
        if not rule.optional:
            key, reason, close = explain_no_match(rule.match, sites, blocks)
            path = f"rules.{name}.match"  # whose keys may have sources of their own
            source = sources.of(f"{path}.{key}" if key else path)
            yield Problem(source, path, reason, close, "correct it, or set optional: true in the rule")
        return
    if not rule.quantize or rule.by is not None:
        return
    wrapped = [site for site in selected if site.wrapper is not None]
    if not wrapped:
        kinds = ", ".join(sorted({type(site.module).__name__ for site in selected}))
        yield sources.problem(f"rules.{name}.match", f"matches only modules that have no wrapper: {kinds}")
        return
    known = list(dict.fromkeys(point.name for site in wrapped for point in site.points))
    named = [key for key in ("weight", "input", "output") if getattr(rule, key) is not None]
    for path, key in [(key, key) for key in named] + [(f"points.{key}", key) for key in rule.points]:
        if key not in known:
            what = f"none of the {len(wrapped)} modules it matches has a point {key!r}"
            yield sources.problem(f"rules.{name}.{path}", what, nearest(key, known))
    if rule.activation is not None and not any(site.operands for site in wrapped):
        what = f"none of the {len(wrapped)} modules it matches multiplies its input by a matrix"
        yield sources.problem(f"rules.{name}.activation", what, (), "every point is what activations means")
    general = (rule.activation, rule.activations)
    if not named and not rule.points and general == (None, None) and not rule.replace:
        yield sources.problem(f"rules.{name}", "the rule selects modules but says nothing of them")
