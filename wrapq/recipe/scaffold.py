"""A new package of presets: a scheme, a recipe that uses it, and a test that resolves every recipe."""

from __future__ import annotations

import re
from pathlib import Path

from wrapq.errors import OutputError, Problem, RecipeError

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_LONGEST = 60

_PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.25"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "0.1.0"
description = "Presets for wrapq"
requires-python = ">=3.11"
dependencies = ["wrapq"]

[project.optional-dependencies]
test = ["pytest"]

[project.entry-points."wrapq.presets"]
{module} = "{module}"

[tool.hatch.build.targets.wheel]
packages = ["{module}"]
"""

_README = """\
# {name}

Presets for wrapq: `conf/` holds parts, a folder for each group, `recipes/` what runs. The names of a package must not
be those of another: begin them with `{module}`.

    pip install -e '.[test]' && pytest
    wrapq presets
    wrapq run recipe={module}_w6a16
"""

_SCHEME = """\
# 6-bit weights in groups of 32; the first line is what `wrapq presets` says.
weight: int6:g32:sym
"""

_RECIPE = """\
# wrapq run recipe={module}_w6a16 model=hf model.path=PATH
# @package _global_
defaults:
  - /scheme@rules.linear: {module}_w6
  - /algorithm@stack.round: rtn
  - _self_

name: {module}_w6a16
description: 6-bit weights in groups of 32 for every linear layer but the last.

rules:
  linear: {{match: {{type: Linear}}}}
  head: {{match: {{name: lm_head}}, quantize: false, optional: true}}
"""

_TEST = '''\
"""Every recipe of this package composes and fits the model that ships with wrapq."""

import pytest
from wrapq.recipe.compose import compose
from wrapq.recipe.presets import list_presets
from wrapq.resolve.resolve import resolve

OURS = [preset for preset in list_presets() if preset.origin == "{name}"]
RECIPES = [preset.name for preset in OURS if preset.kind == "recipe"]


def test_the_package_is_installed():
    assert RECIPES, "no recipe found: pip install -e ."


@pytest.mark.parametrize("preset", OURS, ids=lambda preset: f"{{preset.kind}}={{preset.name}}")
def test_it_says_what_it_is(preset):
    assert preset.description


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_resolves(name):
    composed = compose([f"recipe={{name}}"])
    assert resolve(composed.recipe, composed.sources).modules
'''

_FILES = {
    "pyproject.toml": _PYPROJECT,
    "README.md": _README,
    "{module}/__init__.py": '"""Presets for wrapq."""\n',
    "{module}/conf/scheme/{module}_w6.yaml": _SCHEME,
    "{module}/recipes/{module}_w6a16.yaml": _RECIPE,
    "tests/test_presets.py": _TEST,
}


def new_package(name: str, parent: Path) -> list[Path]:
    """Write a package of presets into the new folder `name` of `parent`; the files.

    Raises:
        RecipeError: `name` is no name for a package.
        OutputError: the folder is there already, or cannot be written.
    """
    if not _NAME.fullmatch(name) or len(name) > _LONGEST or name.replace("_", "-").split("-")[0] == "wrapq":
        what = f"{name[:_LONGEST]!r} cannot be the name of a package of presets"
        remedy = "use small letters, digits, - and _, beginning with a letter, and not with wrapq"
        raise RecipeError([Problem("", what, remedy=remedy)])
    words = {"name": name.replace("_", "-"), "module": name.replace("-", "_")}
    folder = parent / name
    try:
        folder.mkdir()
        return [_write(folder / path.format(**words), text.format(**words)) for path, text in _FILES.items()]
    except FileExistsError as error:
        raise OutputError(f"{folder} is there already; nothing was written") from error
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}") from error


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
