"""Programs of ExecuTorch: what the plan refuses, and, with the package, what XNNPACK computes of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

import wrapq
from tests.export.test_onnx_model import CALIBRATED, SMALL
from tests.export.test_refusals import planned
from tests.exports import export_of
from wrapq.errors import PlanError
from wrapq.export.run_executorch import MODEL

EXPORT = "export=executorch"
LINEAR = "rules.linear."
DYNAMIC = f"{LINEAR}input=int8:token:asym:dyn"


@pytest.mark.parametrize(
    ("words", "reasons"),
    {
        "weights alone": (
            ["recipe=w4a16_rtn"],
            ["XNNPACK multiplies integers by integers, and the input is float", "its input in int8:token:asym:dyn"],
        ),
        "no outputs": (
            ["recipe=w8a8_static"],
            ["integers of fixed ranges where the output has one", "its output in int8:tensor:asym as well"],
        ),
        "centred ranges": (["recipe=w8a8_dynamic"], ["finds ranges as tokens come in int8:token:asym:dyn only"]),
        "sixteen bits": (["recipe=int16_activations"], ["XNNPACK has signed integers of at most 8 bits"]),
        "unsigned": (["recipe=executorch_w8a8", f"{LINEAR}input=uint8:tensor:asym"], ["XNNPACK has signed integers"]),
        "groups of 8 bits": (
            ["recipe=executorch_w4a8", f"{LINEAR}weight=int8:g32"],
            ["weights by channel, and int4 in groups of 32"],
        ),
        "narrow groups": (
            ["recipe=executorch_w4a8", f"{LINEAR}weight=int4:g16:sym"],
            ["weights by channel, and int4 in groups of 32"],
        ),
        "zero points": (["recipe=executorch_w4a8", f"{LINEAR}weight=int4:g32:asym"], ["weights have no zero points"]),
        "negative scales": (
            ["recipe=executorch_w4a8", f"{LINEAR}weight=int4:g32:sym:signed"],
            ["and no negative scales"],
        ),
        "groups and fixed ranges": (
            ["recipe=executorch_w8a8", f"{LINEAR}weight=int4:g32:sym"],
            ["multiplies weights in groups by inputs whose ranges are found as tokens come"],
        ),
        "embeddings": (
            ["recipe=w4a16_w8_embedding"],
            ["model.embed_tokens: XNNPACK has integers for weights of linear layers, not of Embedding"],
        ),
        "ranges of outputs": (
            ["recipe=executorch_w4a8", f"+{LINEAR}output=int8:token:asym:dyn"],
            ["as tokens come at the input of linear layers only, not at output"],
        ),
    }.values(),
)  # fmt: skip
def test_the_plan_refuses_what_xnnpack_cannot_compute(words: list[str], reasons: list[str]) -> None:
    with pytest.raises(PlanError) as refused:
        planned(*words, EXPORT)
    assert all(reason in str(refused.value) for reason in reasons), str(refused.value)


@pytest.mark.runtime
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("recipe", "error", "megabytes"), [("executorch_w8a8", 2e-2, 7), ("executorch_w4a8", 2e-2, 6)])
def test_a_run_exports_what_it_measured(recipe: str, error: float, megabytes: float, tmp_path: Path) -> None:
    done = wrapq.run(recipe, [*CALIBRATED, *SMALL, f"paths.outputs={tmp_path}"])
    assert export_of(done).error <= error
    found = export_of(done).figures
    print(recipe, f"error {export_of(done).error:.2g}", found)
    assert found["top1_agreement"] > 0.95 and found["size_mb"] < megabytes
    assert export_of(done).size == (export_of(done).path / MODEL).stat().st_size
    assert found["size_mb"] < found["float_size_mb"] and found["first_token_speedup"] > 0


@pytest.mark.runtime
@pytest.mark.timeout(1200)
def test_a_part_by_torchaos_quantizer_for_xnnpack_stands_beside_the_rest(tmp_path: Path) -> None:
    part = ["rules.head.quantize=true", "+rules.head.by=pt2e", "+rules.head.quantizer=xnnpack"]
    words = [*CALIBRATED, *SMALL, *part, "export.executorch.beside_float=false", f"paths.outputs={tmp_path}"]
    done = wrapq.run("executorch_w8a8", words)
    assert export_of(done).error <= 2e-2
    assert export_of(done).figures["top1_agreement"] > 0.95 and export_of(done).figures["greedy_agreement"] > 0.5
