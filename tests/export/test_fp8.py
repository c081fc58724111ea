"""Floats of 8 bits in programs and in ONNX: every kind as the converted model computes it, a byte for each weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wrapq
from tests.export.conftest import cache_rule
from tests.export.modules import quantized_network
from tests.export.test_lowering import off
from tests.export.test_onnx_model import ALONE, CALIBRATED, SMALL
from tests.export.test_refusals import planned
from tests.exports import export_of
from wrapq import PTQConfig
from wrapq.errors import PlanError
from wrapq.export.lowering import lower
from wrapq.export.onnx_model import save_onnx, translated

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

OPEN = torch.export.Dim.DYNAMIC
E4M3, E5M2, BYTES = "FLOAT8E4M3FN", "FLOAT8E5M2", "UINT8"
IDS = torch.arange(60).view(4, 15)
EXACT, FEW_TIES = 1e-5, 5e-3
"""Sums in another order; and where those move one number of a row to the next of its grid."""
KINDS: dict[str, tuple[str, str | None, str, set[str]]] = {
    "channel": ("fp8_e4m3:channel", None, "fp8_e4m3:channel", {E4M3, BYTES}),
    "tensor, static": ("fp8_e4m3:tensor", "fp8_e4m3:tensor", "fp8_e4m3:tensor", {E4M3, BYTES}),
    "tokens": ("fp8_e4m3:channel", "fp8_e4m3:token:dyn", "fp8_e4m3:g16", {E4M3, BYTES}),
    "all tokens": ("fp8_e5m2:channel", "fp8_e5m2:tensor:dyn", "fp8_e5m2:tensor", {E5M2, BYTES}),
    "groups of both": ("fp8_e4m3:g16", "fp8_e4m3:g16:dyn", "fp8_e4m3:b32x32", {E4M3, BYTES}),
    "blocks with a ragged edge": ("fp8_e4m3:b40x40", "fp8_e4m3:channel@-1", "fp8_e4m3:channel@1", {E4M3, BYTES}),
    "mxfp8": ("mxfp8", None, "mxfp8", {E4M3, BYTES}),
    "among integers": ("int8:channel", "fp8_e4m3:tensor", "int8:channel", {"INT8"}),
}
"""Weights, inputs, the weight of the table, and what the file holds weights in."""


class Network(nn.Module):
    """A table and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(60, 96), nn.Linear(96, 128), nn.Linear(128, 96)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.table(ids))))


def quantized(weight: str, activation: str | None, table: str | None) -> nn.Module:
    torch.manual_seed(0)
    prepared = wrapq.prepare(Network().eval(), PTQConfig(weight, activation, overrides={"table": {"weight": table}}))
    wrapq.calibrate(prepared, [IDS[:1]], {"round": "rtn"})  # others are beyond the ranges of these few
    return wrapq.convert(prepared)


@torch.no_grad()
def in_onnxruntime(model: nn.Module, example: Tensor, given: Tensor, path: Path) -> Tensor:
    program = torch.export.export(lower(model), (example,), dynamic_shapes=((OPEN, *(None,) * (example.dim() - 1)),))
    save_onnx(translated(program, ["given"], ["result"], True), path)
    (result,) = onnxruntime.InferenceSession(path).run(None, {"given": given.numpy()})
    return torch.from_numpy(result)


def weight_types(path: Path) -> set[str]:
    import onnx

    kinds: Any = onnx.TensorProto.DataType
    tensors = onnx.load(path).graph.initializer
    return {kinds.Name(each.data_type) for each in tensors if len(each.dims) == 2 and min(each.dims) >= 60}


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_computes_the_same(kind: str, tmp_path: Path) -> None:
    *specs, types = KINDS[kind]
    model, path = quantized(*specs), tmp_path / "model.onnx"
    found, expected = in_onnxruntime(model, IDS, IDS[:3], path), model(IDS[:3])
    assert off(found, expected) <= (EXACT if specs[1] is None else FEW_TIES)
    import onnx

    onnx.checker.check_model(onnx.load(path))
    assert weight_types(path) == types


def test_a_convolution(tmp_path: Path) -> None:
    fp8 = [
        f"rules.linear.{point}=fp8_e4m3:{'tensor' if point == 'input' else 'channel'}" for point in ("weight", "input")
    ]
    model, example, other = quantized_network("w8a8_static", *fp8)
    found = in_onnxruntime(model, example, other, tmp_path / "model.onnx")
    torch.testing.assert_close(found, model(other), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_run_exports_what_it_measured(tmp_path: Path) -> None:
    """The shipped model with weights, inputs and the cache in fp8."""
    words = ["scheme@rules.linear=fp8", cache_rule("fp8_e4m3:tensor"), ALONE]
    done = wrapq.run("onnx_w8a8", [*words, *CALIBRATED, *SMALL, f"paths.outputs={tmp_path}"])
    assert export_of(done).error <= 1e-2 and done.figures["export_top1_agreement"] > 0.98
    assert export_of(done).size < 1.3 * (done.folder / "model.safetensors").stat().st_size


BY_HALVES = 5e-2
"""OpenVINO rounds inputs to half precision before it rounds them to fp8."""
RUNTIMES = {"torch_export": EXACT, "openvino": BY_HALVES, "aot_inductor": FEW_TIES}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "aot_inductor" else n for n in RUNTIMES]
)
def test_other_runtimes_compute_it(name: str, tmp_path: Path) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    model = quantized("fp8_e4m3:b40x40", "fp8_e4m3:token:dyn", "fp8_e4m3:channel")
    made = wrapq.export_module(model, name, tmp_path / "made", IDS)
    assert made.error <= RUNTIMES[name]


@pytest.mark.parametrize(
    ("words", "reason", "remedy"),
    [
        ("export=executorch", "XNNPACK has signed integers of at most 8 bits", "int8:channel:sym"),
        ("export=circle", "Circle has integers of 4, 8 and 16 bits", "int8:channel:sym"),
        ("rules.linear.weight=fp4_e2m1:g32 export=onnx", "fp8, not for fp4_e2m1", "int4:g32:sym"),
        (
            "rules.linear.input=mxfp8:dyn export=openvino",
            "scales found as tokens come are float32",
            "int8:token:sym:dyn",
        ),
    ],
)
def test_the_plan_refuses_what_a_runtime_does_not_know(words: str, reason: str, remedy: str) -> None:
    with pytest.raises(PlanError) as refused:
        planned("recipe=w8a8_dynamic", "rules.linear.weight=fp8_e4m3:channel", *words.split())
    assert reason in str(refused.value) and f"quantize it in {remedy}, which is the nearest" in str(refused.value)
