"""Circle models: what the plan refuses, and, with the package, what tico's reference runtime computes of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import wrapq
from tests.export.test_lowering import converted, logits, off
from tests.export.test_onnx_model import CALIBRATED, SMALL
from tests.export.test_refusals import planned
from tests.exports import export_of
from tests.models import DEMO
from wrapq.errors import PlanError
from wrapq.export.circle_model import Circle, circle_model
from wrapq.export.lowering import Lowered, lower
from wrapq.export.run_circle import MODEL

EXPORT, LINEAR = "export=circle", "rules.linear."


@pytest.mark.parametrize(
    ("words", "reason"),
    {
        "groups": (["recipe=w4a16_rtn"], "Circle has weights by channel, and would hold others as floats"),
        "dynamic": (["recipe=w8a8_dynamic"], "Circle has one fixed scale for a tensor between operators"),
        "three bits": (["recipe=circle_int16", f"{LINEAR}weight=int3:channel"], "integers of 4, 8 and 16 bits"),
        "sixteen bits off centre": (
            ["recipe=circle_int16", "rules.all.activations=int16:tensor:asym"],
            "integers of 16 bits are centred on zero: int16 with sym",
        ),
        "one scale": (
            ["recipe=circle_int16", f"{LINEAR}weight=int16:tensor:sym"],
            "weights of products by channel\n    quantize it in int16:channel",
        ),
    }.values(),
)
def test_the_plan_refuses_what_circle_cannot_say(words: list[str], reason: str) -> None:
    with pytest.raises(PlanError) as refused:
        planned(*words, EXPORT)
    assert reason in str(refused.value), str(refused.value)


@pytest.mark.parametrize("weight", ["int8:channel:sym", "int4:channel:asym", "int8:tensor:sym"])
def test_the_unsigned_grid_is_the_same(weight: str, make_model) -> None:
    model = converted(make_model("llama"), weight, "int8:tensor:asym")
    moved = lower(model, unsigned=True)
    assert off(logits(moved), logits(lower(model))) <= 1e-6
    held = [module for module in moved.modules() if isinstance(module, Lowered)]
    assert held and all(module.weight_codes.dtype == torch.uint8 for module in held)
    assert all(not module.specs[point].dtype.signed for module in held for point in module.specs)


@pytest.mark.runtime
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("recipe", ["circle_int16", "circle_w4a16"])
def test_a_run_exports_what_it_measured(recipe: str, tmp_path: Path) -> None:
    done = wrapq.run(recipe, [*CALIBRATED, *SMALL, f"paths.outputs={tmp_path}"])
    assert export_of(done).error <= 2e-3
    print(recipe, f"error {export_of(done).error:.2g}", export_of(done).figures)
    assert export_of(done).figures["top1_agreement"] > 0.98
    size = (export_of(done).path / MODEL).stat().st_size
    assert export_of(done).size == size < 1.3 * (done.folder / "model.safetensors").stat().st_size


@pytest.mark.runtime
@pytest.mark.timeout(1200)
def test_the_float_model_is_the_same_there(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    size = (tmp_path / MODEL).write_bytes(circle_model(model, 128))
    ids = torch.arange(96).view(2, 48)
    reading = Circle().read(tmp_path, ids, "cpu")
    print("float", size / 1e6, dict(reading.measured))
    assert off(reading.logits, logits(model, ids)) <= 1e-4
