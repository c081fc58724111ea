"""Overrides that choose files: `recipe=NAME`, `recipe=FILE`, `model=hf`, `scheme@rules.linear=w8a16`.

`scheme=w8a16` alone, a group that the recipe chooses from under keys of its own, means the one place where it does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra.core.override_parser.types import Override

from wrapq.errors import Problem, RecipeError, unknown
from wrapq.paths import expand
from wrapq.recipe.hydra_defaults import Defaults, compose_defaults, parse_override
from wrapq.recipe.preset_index import PRIMARY, RECIPE, Library
from wrapq.recipe.presets import SEVERAL

_PATH = re.compile(r"[./~].*|.*\.ya?ml", re.DOTALL)
"""What names a recipe by its file."""


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
        if override.key_or_group == RECIPE and isinstance(value, str) and _PATH.fullmatch(value):
            file = expand(value).absolute()
            if not os.path.isfile(file):  # false, too, for what no path can be
                raise RecipeError([Problem(f"override {override.input_line}", "", f"no such recipe file: {value}")])
            override = replace(override, _value=file.stem)
        out.append(override)
    return out, file


def settle_choices(library: Library, overrides: Sequence[Override]) -> tuple[list[Override], dict[str, str]]:
    """Check the overrides that choose files and spell out the short ones; raises `RecipeError` with all mistakes.

    Returns the overrides ready for Hydra, and the user's text for each defaults-list key that they decide.
    """
    chooses = [o for o in overrides if library.is_group(o.key_or_group) and not isinstance(o.value(), dict)]
    problems = [problem for override in chooses if (problem := _choice_problem(library, override)) is not None]
    if problems:
        raise RecipeError(problems)
    plain = {next(iter(entry)) for entry in library.defaults(PRIMARY) if isinstance(entry, dict)}
    changes = [o for o in chooses if not (o.is_add() or o.is_delete())]
    short = [o for o in changes if o.package is None and o.key_or_group not in plain]
    known = compose_defaults(library, [o for o in overrides if o not in short]) if short else None
    settled, written = list[Override](), dict[str, str]()
    for override in overrides:
        final = _spell_out(override, known) if known is not None and override in short else override
        settled.append(final)
        if override in chooses and (group := final.key_or_group) != RECIPE:
            written[f"{group}@{final.package}" if final.package else group] = override.input_line or ""
    return settled, written


def _choice_problem(library: Library, override: Override) -> Problem | None:
    source, value, group = f"override {override.input_line}", override.value(), override.key_or_group
    if override.is_delete() and (value is None or isinstance(value, str)):
        return None
    if override.is_force_add():
        what = f"a {group} is chosen with {group}=NAME or added with +{group}@PLACE=NAME, not with ++"
        return Problem(source, "", what)
    names = value if group in SEVERAL and isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        remedy = f"there is: {', '.join(library.options(group))}"
        return Problem(source, "", f"{value!r} is not the name of a {group}", remedy=remedy)
    missing = [str(name) for name in names if not library.has(f"{group}/{name}")]
    return unknown(source, "", group, missing[0], library.options(group)) if missing else None


def _spell_out(override: Override, known: Defaults) -> Override:
    """The override of a group that recipes choose from per rule or stage (`scheme`), with the place where this does."""
    group, value, source = override.key_or_group, override.value(), f"override {override.input_line}"
    keys = [layer.choice for layer in known.layers if layer.choice]
    places = [key.partition("@")[2] for key in keys if key.startswith(f"{group}@")]
    if len(places) == 1:
        return replace(override, package=places[0])
    if places:
        what = f"this recipe chooses a {group} in {len(places)} places"
        remedy = "say which: " + " or ".join(f"{group}@{place}={value}" for place in places)
    else:
        what = f"nothing in this recipe chooses a {group}"
        remedy = f"add one: +{group}@{_EXAMPLE.get(group, 'PLACE')}={value}"
    raise RecipeError([Problem(source, "", what, remedy=remedy)])


_EXAMPLE = {"scheme": "rules.NAME", "algorithm": "stack.NAME"}
