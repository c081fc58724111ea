"""Every recipe that ships runs, and the model it leaves has every point of its plan."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

import wrapq
from wrapq.recipe.compose import compose
from wrapq.recipe.presets import list_presets
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve
from wrapq.runtime.module import QuantizedModule

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NAMES = sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))

APART = ("circle_", "executorch_", "gptq_", "awq_")
"""Whose exports want packages that are large, or an environment of their own, in which other tests run them."""


def small(name: str) -> list[str]:
    elsewhere = APART if find_spec("llama_cpp") else (*APART, "gguf_")
    unexported = ["export=none"] if name.startswith(elsewhere) else []
    composed = compose([f"recipe={name}", *unexported])
    learned = [f"stack.{name}.iterations=3" for name, s in composed.recipe.stack.items() if s.algorithm == "autoround"]
    calibrated = resolve(composed.recipe, composed.sources).needs_calibration
    alone = [f"export.{format_name}.beside_float=false" for format_name in composed.recipe.export]
    return ["evaluation.tokens=1024", *(["calibration.samples=8"] if calibrated else []), *learned, *unexported, *alone]


def test_the_folder_is_what_the_presets_list() -> None:
    assert sorted(preset.name for preset in list_presets() if preset.kind == "recipe") == NAMES
    shipped = {"demo", "w8a8_static", "w8a8_dynamic", "w8a16", "w4a16_rtn", "int16_activations"}
    assert shipped <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_has_a_description(name: str) -> None:
    assert len(compose([f"recipe={name}"]).recipe.description) > 20


PLAIN = ("demo", "w4a16_gptq", "w8a8_dynamic")
"""The others are slow; those that README shows run there."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in PLAIN else pytest.mark.slow) for n in NAMES])
def test_recipe_runs_and_every_point_is_in_the_model(name: str, tmp_path: Path) -> None:
    result = wrapq.run(name, [*small(name), "tracking=none", f"paths.outputs={tmp_path}"])
    plan = Plan.model_validate_json((result.folder / "plan.json").read_text())
    model = wrapq.load(result.folder)
    loaded = {key: dict(m.specs) for key, m in model.named_modules() if isinstance(m, QuantizedModule)}
    assert loaded == plan.specs()
    assert sum(map(len, loaded.values())) > 20
    near = 0.3 if name.startswith("w2") else 0.1
    assert result.metrics["quantized"]["perplexity"] == pytest.approx(result.metrics["float"]["perplexity"], rel=near)
