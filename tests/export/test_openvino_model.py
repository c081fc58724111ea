"""OpenVINO models, from recipes to what OpenVINO computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.export.test_lowering import converted, logits, off
from tests.export.test_onnx_model import CASES
from tests.export.test_refusals import planned
from wrapq.errors import ModelError, PlanError
from wrapq.export.openvino_model import OpenVino
from wrapq.export.run_openvino import MODEL
from wrapq.runs.folder import RunFolder

pytest.importorskip("openvino")

TAKEN = ("int4 groups", "uint8 groups with zero points", "int8 channel, static", "dynamic, symmetric")
STEP = 5e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", TAKEN)
def test_it_computes_the_same(
    name: str, make_model: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, activation, _ = CASES[name]
    model, exporter = converted(make_model("llama"), weight, activation), OpenVino()
    monkeypatch.setattr(exporter, "check", lambda plan: ())
    exporter.export(model, None, RunFolder(tmp_path))  # type: ignore[arg-type] - which only check reads
    ids = torch.arange(20).view(2, 10)
    reading = exporter.read(tmp_path, ids, "cpu")
    assert off(reading.logits, logits(model, ids)) <= STEP
    assert reading.tokens is not None and reading.tokens.shape == (1, 32)


@pytest.mark.parametrize("inputs", ["int16:tensor:sym", "int4:tensor:asym"])
def test_the_plan_refuses_what_openvino_does_not_run(inputs: str) -> None:
    with pytest.raises(PlanError, match="between operators OpenVINO has integers of 8 bits"):
        planned("recipe=w8a8_static", f"rules.linear.input={inputs}", "export=openvino")


def test_a_damaged_model_is_told(tmp_path: Path) -> None:
    (tmp_path / MODEL).write_text("<nothing/>")
    with pytest.raises(ModelError, match=r"OpenVINO does not run the export: "):
        OpenVino().read(tmp_path, torch.arange(8)[None], "cpu")
