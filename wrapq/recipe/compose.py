"""From a recipe's name and overrides to the checked recipe, with the source of every key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wrapq.errors import Problem, RecipeError
from wrapq.recipe.group_choices import parse_overrides, settle_choices, split_recipe_file
from wrapq.recipe.hydra_defaults import Defaults, compose_defaults
from wrapq.recipe.interpolation import resolve_references
from wrapq.recipe.merge import Layers
from wrapq.recipe.overrides import apply_override
from wrapq.recipe.preset_index import RECIPE, Library
from wrapq.recipe.presets import SETTINGS_GROUPS
from wrapq.recipe.provenance import Provenance
from wrapq.recipe.schema import Recipe, Settings
from wrapq.recipe.validate import build, missing_problems

_REMOTE_CODE = ("runtime", "trust_remote_code")


@dataclass(frozen=True)
class Composed:
    """A recipe ready to be resolved against a model.

    Attributes:
        recipe: what decides the result.
        settings: the machine.
        sources: who set each key, by dotted path; a key that is not here has its default.
    """

    recipe: Recipe
    settings: Settings
    sources: dict[str, Provenance]


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
    settled, written = settle_choices(library, parsed)
    defaults, layers = compose_defaults(library, settled), Layers()
    for layer in defaults.layers:
        layers.add_file(layer.document, layer.package, written.get(layer.choice or "", ""))
    problems = [problem for override in defaults.overrides for problem in apply_override(layers, override)]
    problems += missing_problems(layers) + resolve_references(layers)
    layers.fold_specs()
    recipe, settings, wrong = _build(layers, defaults)
    problems += wrong
    # a field that the schema already refused is the reason why the spec makes no sense
    refused = [problem.path for problem in problems]
    unfolded = [layers.problem(path, what) for path, what in layers.problems]
    problems += [problem for problem in unfolded if not any(path.startswith(problem.path) for path in refused)]
    if problems or recipe is None or settings is None:
        raise RecipeError(list(dict.fromkeys(problems)))
    return Composed(recipe, settings, layers.leaves())


def _build(layers: Layers, defaults: Defaults) -> tuple[Recipe | None, Settings | None, list[Problem]]:
    data: dict[str, Any] = dict(layers.data)
    settings = {key: data.pop(key) for key in SETTINGS_GROUPS if key in data}
    data.setdefault("name", (defaults.choices.get(RECIPE) or "recipe").replace("/", "-"))  # the name of its file
    recipe, problems = build(Recipe, data, layers)
    machine, more = build(Settings, settings, layers)
    source = layers.source(_REMOTE_CODE)
    if machine is not None and machine.runtime.trust_remote_code and source is not None and source.file:
        more.append(layers.problem(_REMOTE_CODE, "only the command line may allow a model's own code to run"))
    return recipe, machine, problems + more
