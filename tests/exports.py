"""What a run with one export says of it, and what holds of every run of a recipe."""

from __future__ import annotations

import pytest

import wrapq
from wrapq.engine.export import Exported
from wrapq.engine.record import RunResult
from wrapq.resolve.plan import Plan
from wrapq.runtime.module import QuantizedModule


def export_of(run: RunResult | None) -> Exported:
    assert run is not None
    (exported,) = run.exports.values()
    return exported


def check_recipe(run: RunResult, name: str) -> None:
    """That the model which a run of the recipe `name` left has every point of its plan, and predicts text as well."""
    plan = Plan.model_validate_json((run.folder / "plan.json").read_text())
    model = wrapq.load(run.folder)
    loaded = {key: dict(m.specs) for key, m in model.named_modules() if isinstance(m, QuantizedModule)}
    assert loaded == plan.specs()
    assert sum(map(len, loaded.values())) > 20
    near = 0.3 if name.startswith("w2") else 0.1
    assert run.metrics["quantized"]["perplexity"] == pytest.approx(run.metrics["float"]["perplexity"], rel=near)
