"""From a recipe's name and overrides to the checked recipe, with the source of every key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wrapq.errors import Problem, RecipeError
from wrapq.recipe.choices import Choices, parse_overrides, settle_choices, split_recipe_file
from wrapq.recipe.hydra_defaults import Defaults, compose_defaults
from wrapq.recipe.layers import Layers
from wrapq.recipe.library import RECIPE, Library
from wrapq.recipe.overrides import apply_override
from wrapq.recipe.presets import SETTINGS_GROUPS
from wrapq.recipe.provenance import DEFAULT, Source
from wrapq.recipe.references import resolve_references
from wrapq.recipe.schema import Recipe, Settings
from wrapq.recipe.validate import at, build, missing_problems

_REMOTE_CODE = ("runtime", "trust_remote_code")


@dataclass(frozen=True)
class Composed:
    """A recipe ready to be resolved against a model.

    Attributes:
        recipe: what decides the result.
        settings: the machine.
        sources: who set each key, by dotted path; a key that is not here has its default (`source_of`).
        overrides: the overrides as given.
    """

    recipe: Recipe
    settings: Settings
    sources: dict[str, Source]
    overrides: tuple[str, ...]

    def source_of(self, path: str) -> Source:
        """Who set the key at the dotted `path`, or the nearest key above it; `default` when nobody did."""
        while path not in self.sources and "." in path:
            path = path.rpartition(".")[0]
        return self.sources.get(path, DEFAULT)


def compose(overrides: Sequence[str] = (), extra_dirs: Sequence[Path] = ()) -> Composed:
    """Compose and check a recipe.

    Args:
        overrides: Hydra overrides; `recipe=NAME` or `recipe=FILE.yaml` chooses the recipe, `demo` when there is none.
        extra_dirs: folders that hold presets of one's own (`conf/` and `recipes/`), looked into first.

    Raises:
        RecipeError: with every mistake that could be found, each with the place that made it.
    """
    parsed, recipe_file = split_recipe_file(parse_overrides(overrides))
    library = Library(extra_dirs, recipe_file)
    choices = settle_choices(library, parsed)
    defaults = compose_defaults(library, choices.overrides)
    layers, problems = _merge(defaults, choices)
    problems += missing_problems(layers)
    problems += [Problem(at(layers, path), what) for path, what in resolve_references(layers)]
    layers.fold_specs()
    recipe, settings, wrong = _build(layers, defaults)
    problems += wrong
    known = {problem.where for problem in problems}
    problems += [Problem(at(layers, path), what) for path, what in layers.problems if _is_new(at(layers, path), known)]
    if problems or recipe is None or settings is None:
        raise RecipeError(list(dict.fromkeys(problems)))
    return Composed(recipe, settings, layers.leaves(), tuple(overrides))


def _merge(defaults: Defaults, choices: Choices) -> tuple[Layers, list[Problem]]:
    layers = Layers()
    for layer in defaults.layers:
        layers.add_file(layer.document, layer.package, choices.written.get(layer.choice or "", ""))
    problems = [p for override in defaults.overrides for p in apply_override(layers, override)]
    return layers, problems


def _build(layers: Layers, defaults: Defaults) -> tuple[Recipe | None, Settings | None, list[Problem]]:
    data: dict[str, Any] = dict(layers.data)
    settings = {key: data.pop(key) for key in SETTINGS_GROUPS if key in data}
    data.setdefault("name", _name_of(defaults))
    recipe, problems = build(Recipe, data, layers)
    machine, more = build(Settings, settings, layers)
    source = layers.source(_REMOTE_CODE)
    if machine is not None and machine.runtime.trust_remote_code and source is not None and source.place:
        more.append(Problem(at(layers, _REMOTE_CODE), "only the command line may allow a model's own code to run"))
    return recipe, machine, problems + more


def _name_of(defaults: Defaults) -> str:
    """The recipe's file name, for a recipe that does not say its own."""
    return (defaults.choices.get(RECIPE) or "recipe").replace("/", "-")


def _is_new(where: str, known: set[str]) -> bool:
    # a field that the schema already refused is the reason why the spec makes no sense
    return not any(
        other.startswith(where) or other.partition(": ")[2].startswith(where.partition(": ")[2]) for other in known
    )
