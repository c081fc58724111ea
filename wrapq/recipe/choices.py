"""Overrides that choose files: `recipe=NAME`, `recipe=FILE`, `model=hf`, `scheme@rules.linear=w8a16`.

`scheme=w8a16` alone, a group that the recipe chooses from under keys of its own, means the one place where it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.override_parser.types import Override

from wrapq.errors import Problem, RecipeError
from wrapq.recipe.hydra_defaults import Defaults, compose_defaults, parse_override
from wrapq.recipe.library import PRIMARY, RECIPE, Library
from wrapq.recipe.presets import SUFFIX
from wrapq.recipe.suggest import unknown


@dataclass(frozen=True)
class Choices:
    """The overrides ready for Hydra; `written` has the user's text for each defaults-list key they decide."""

    overrides: tuple[Override, ...]
    written: dict[str, str]


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """All the overrides; raises `RecipeError` with every one that cannot be parsed."""
    parsed: list[Override] = []
    problems: list[Problem] = []
    for text in texts:
        try:
            parsed.append(parse_override(text))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return parsed


def split_recipe_file(overrides: Sequence[Override]) -> tuple[list[Override], Path | None]:
    """Replace `recipe=FILE.yaml` by the choice of that file; raises `RecipeError` when there is no such file."""
    file: Path | None = None
    out: list[Override] = []
    for override in overrides:
        value = override.value()
        if override.key_or_group == RECIPE and isinstance(value, str) and _is_path(value):
            file = Path(value).expanduser().absolute()
            if not _is_file(file):
                raise RecipeError([Problem(f"override {override.input_line}", f"no such recipe file: {value}")])
            override = replace(override, _value=file.stem)
        out.append(override)
    return out, file


def settle_choices(library: Library, overrides: Sequence[Override]) -> Choices:
    """Check the overrides that choose files and spell out the short ones; raises `RecipeError` with all mistakes."""
    chooses = [o for o in overrides if library.is_group(o.key_or_group) and not isinstance(o.value(), dict)]
    problems = [problem for override in chooses for problem in _choice_problems(library, override)]
    if problems:
        raise RecipeError(problems)
    plain = {next(iter(entry)) for entry in library.defaults(PRIMARY) if isinstance(entry, dict)}
    short = [o for o in chooses if _is_short(o, plain)]
    settled = {id(o): o for o in overrides}
    if short:
        rest = [o for o in overrides if all(o is not s for s in short)]
        known = compose_defaults(library, rest)
        settled |= {id(o): _spell_out(o, known) for o in short}
    final = [settled[id(o)] for o in overrides]
    keys = {_key(settled[id(o)]): o.input_line or "" for o in chooses if o.key_or_group != RECIPE}
    return Choices(tuple(final), keys)


def _choice_problems(library: Library, override: Override) -> list[Problem]:
    where, value, group = f"override {override.input_line}", override.value(), override.key_or_group
    if override.is_delete() and (value is None or isinstance(value, str)):
        return []
    if override.is_force_add():
        return [Problem(where, f"a {group} is chosen with {group}=NAME or added with +{group}@PLACE=NAME, not with ++")]
    if not isinstance(value, str):
        return [Problem(where, f"{value!r} is not the name of a {group}", remedy=_there_is(library, group))]
    if not library.has(f"{group}/{value}"):
        return [unknown(where, group, value, library.options(group))]
    return []


def _is_short(override: Override, plain: set[str]) -> bool:
    """Whether the override names a group (`scheme`) that recipes choose from per rule or stage, but not where."""
    changes = not (override.is_add() or override.is_delete())
    return changes and override.package is None and override.key_or_group not in plain


def _spell_out(override: Override, known: Defaults) -> Override:
    group, where = override.key_or_group, f"override {override.input_line}"
    keys = [layer.choice for layer in known.layers if layer.choice]
    places = [key.partition("@")[2] for key in keys if key.startswith(f"{group}@")]
    if len(places) == 1:
        return replace(override, package=places[0])
    value = override.value()
    if not places:
        remedy = f"add one: +{group}@{_EXAMPLE.get(group, 'PLACE')}={value}"
        raise RecipeError([Problem(where, f"nothing in this recipe chooses a {group}", remedy=remedy)])
    remedy = "say which: " + " or ".join(f"{group}@{place}={value}" for place in places)
    raise RecipeError([Problem(where, f"this recipe chooses a {group} in {len(places)} places", remedy=remedy)])


_EXAMPLE = {"scheme": "rules.NAME", "algorithm": "stack.NAME"}


def _key(override: Override) -> str:
    return f"{override.key_or_group}@{override.package}" if override.package else override.key_or_group


def _there_is(library: Library, group: str) -> str:
    return f"there is: {', '.join(library.options(group))}"


def _is_path(value: str) -> bool:
    return value.endswith((SUFFIX, ".yml")) or value.startswith((".", "/", "~"))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
