"""Every recipe that ships runs, and the model it leaves has every point of its plan; those that export
something run in `tests/export/test_every_target.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

import wrapq
from tests.export.test_every_target import ROWS, RUNTIME
from tests.exports import check_recipe
from wrapq.recipe.compose import compose
from wrapq.recipe.presets import list_presets
from wrapq.resolve.resolve import resolve

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NAMES = sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def small(name: str) -> list[str]:
    composed = compose([f"recipe={name}", "export=none"])
    learned = [f"stack.{name}.iterations=3" for name, s in composed.recipe.stack.items() if s.algorithm == "autoround"]
    calibrated = resolve(composed.recipe, composed.sources).needs_calibration
    return ["evaluation.tokens=1024", *(["calibration.samples=8"] if calibrated else []), *learned, "export=none"]


def test_the_folder_is_what_the_presets_list() -> None:
    assert sorted(preset.name for preset in list_presets() if preset.kind == "recipe") == NAMES
    shipped = {"demo", "w8a8_static", "w8a8_dynamic", "w8a16", "w4a16_rtn", "int16_activations"}
    assert shipped <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_has_a_description(name: str) -> None:
    assert len(compose([f"recipe={name}"]).recipe.description) > 20


PLAIN = ("demo", "w8a8_dynamic")
"""The others are slow; those that README shows run there."""
EXPORTED = {row.recipe for row in ROWS if row.marks is not RUNTIME}
"""Those that run there."""
HERE = [pytest.param(n, marks=() if n in PLAIN else pytest.mark.slow) for n in NAMES if n not in EXPORTED]


@pytest.mark.parametrize("name", HERE)
def test_recipe_runs_and_every_point_is_in_the_model(name: str, tmp_path: Path) -> None:
    result = wrapq.run(name, [*small(name), "tracking=none", f"paths.outputs={tmp_path}"])
    check_recipe(result, name)
