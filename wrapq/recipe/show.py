"""One preset in full: where it is from, what it says, and what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wrapq.errors import Problem, RecipeError, unknown
from wrapq.recipe.compose import compose
from wrapq.recipe.dump import to_yaml
from wrapq.recipe.preset_index import Library
from wrapq.recipe.presets import Preset, list_presets
from wrapq.recipe.yaml_reader import read_document


def show_preset(name: str, extra_dirs: Sequence[Path] = ()) -> tuple[Preset, str, str]:
    """The preset `name`, which may say its kind: `w4a16_gptq`, `recipe=w4a16_gptq`, `scheme=w4a16`.

    Returns it, the text of its file with the comments, and for a recipe the file that says the same without any preset;
    empty for what is only a part of one.

    Raises:
        RecipeError: there is none or several of the name, or its file is not what a preset may be.
    """
    kind, _, bare = name.rpartition("=")
    presets = list_presets(extra_dirs)
    found = [preset for preset in presets if preset.name == bare and kind in ("", preset.kind)]
    if not found:
        names = [f"{preset.kind}={preset.name}" for preset in presets]
        raise RecipeError([unknown("", "", "preset", name, names if kind else [preset.name for preset in presets])])
    if len(kinds := dict.fromkeys(preset.kind for preset in found)) > 1:
        remedy = "say which: " + " or ".join(f"{kind}={bare}" for kind in kinds)
        raise RecipeError([Problem("", "", f"there are {len(kinds)} presets of the name {bare!r}", remedy=remedy)])
    preset = found[0]
    text = read_document(preset.path, str(preset.path)).text
    Library(extra_dirs).document(f"{preset.kind}/{preset.name}")  # refuses what is no data, and a name with two homes
    composed = to_yaml(compose([f"recipe={preset.name}"], extra_dirs).recipe) if preset.kind == "recipe" else ""
    return preset, text, composed
