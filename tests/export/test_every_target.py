"""Every target on every kind of model that it takes: a run or a module is exported, and its real runtime loads,
compares and measures what was made. Which layers and specs a target takes is said in the file of its name."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import wrapq
from tests.export.modules import MODULES, check_other_sizes, quantized
from tests.exports import check_recipe
from wrapq.errors import PlanError
from wrapq.recipe.compose import compose
from wrapq.recipe.presets import list_presets
from wrapq.resolve.resolve import resolve

SHIPPED, DOCS = "shipped", "tiny-llama-docs"
CONVOLUTIONS, ENCODER = "convolutions", "encoder"
SMALL = ("evaluation.tokens=512", "evaluation.seq_len=128", "tracking=none", "runtime.kernels=reference")
CALIBRATED = ("calibration.samples=8", "calibration.seq_len=128")
EXACT, CLOSE, STEP, ROUNDED, ROUNDED_BY_256 = 1e-5, 1e-2, 5e-2, 2e-2, 4e-2
"""Sums in another order; products in bfloat16; numbers that those move to the other side of a step; inputs that the
runtime rounds itself."""
FAST, SLOW = (), (pytest.mark.slow, pytest.mark.timeout(900))  # an environment of its own for GPTQModel takes minutes
RUNTIME = pytest.mark.runtime, pytest.mark.timeout(1200)


class Row(NamedTuple):
    """A run: its recipe, and for each target how far its logits may be off."""

    model: str
    recipe: str
    targets: dict[str, float]
    marks: Any = SLOW


ROWS = [
    Row(SHIPPED, "w4a16_gptq", {"torch_export": 1e-6}, FAST),
    Row(SHIPPED, "onnx_w4a16", {"onnx": EXACT}, FAST),
    Row(SHIPPED, "gguf_q8_0", {"gguf": ROUNDED}, FAST),
    Row(SHIPPED, "gguf_q4_k", {"gguf": ROUNDED_BY_256}),
    Row(SHIPPED, "onnx_w8a8", {"onnx": STEP, "aot_inductor": STEP}),
    Row(SHIPPED, "openvino_w4a16", {"openvino": STEP}),
    Row(SHIPPED, "torchao_w8a8", {"torchao": ROUNDED, "compressed_tensors": STEP}),
    Row(SHIPPED, "gptq_w4a16", {"gptq": CLOSE, "awq": CLOSE}),
    Row(SHIPPED, "executorch_w8a8", {"executorch": ROUNDED}, RUNTIME),
    Row(SHIPPED, "circle_int16", {"circle": ROUNDED}, RUNTIME),
    Row(DOCS, "openvino_w8a8", {"openvino": STEP, "onnx": STEP, "torch_export": STEP, "aot_inductor": STEP}),
    Row(DOCS, "gguf_q4_0", {"gguf": ROUNDED}),
    Row(DOCS, "torchao_w8a8", {"torchao": STEP, "compressed_tensors": STEP}),
    Row(DOCS, "awq_w4a16", {"awq": CLOSE, "gptq": CLOSE}),
    Row(DOCS, "executorch_w4a8", {"executorch": ROUNDED}, RUNTIME),
    Row(DOCS, "circle_w4a16", {"circle": ROUNDED}, RUNTIME),
]

CELLS: dict[tuple[str, str], Any] = {
    ("torch_export", CONVOLUTIONS): FAST,
    ("torch_export", ENCODER): FAST,
    ("onnx", CONVOLUTIONS): FAST,
    ("onnx", ENCODER): FAST,
    ("openvino", CONVOLUTIONS): SLOW,
    ("openvino", ENCODER): SLOW,
    ("aot_inductor", CONVOLUTIONS): SLOW,
    ("aot_inductor", ENCODER): SLOW,
    ("executorch", ENCODER): RUNTIME,
    ("circle", CONVOLUTIONS): RUNTIME,
    ("circle", ENCODER): RUNTIME,
}
"""Modules that are no language models, and what exports them."""

ORDINARY = 0.9, 0.1
LEAST = {"gptq": (0.95, 0.5), "awq": (0.95, 0.5), "torchao": (0.95, 0.2)}
"""The share of next tokens and of 32 in a row that the shipped model has to keep, and others; all where it is exact."""
WRITTEN = {
    "torch_export": (("model.pt2",), "torch.export.load"),
    "aot_inductor": (("compiled.pt2",), "aoti_load_package"),
    "onnx": (("model.onnx",), "onnxruntime.InferenceSession"),
    "openvino": (("openvino_model.xml", "openvino_model.bin"), ""),
    "gguf": (("model.gguf",), ""),
}
"""The files of weights, and what a note says of how they are loaded."""

LANGUAGE = "holds language models of a run alone"
REFUSED = {
    **{(name, kind): LANGUAGE for name in ("compressed_tensors", "gguf", "gptq", "awq", "torchao") for kind in MODULES},
    ("executorch", CONVOLUTIONS): "XNNPACK has integers for weights of linear layers, not of Conv",
}
"""What a target does not take, and what it says."""


RUNTIMES = {"gguf": "llama_cpp", "executorch": "executorch", "circle": "tico"}
"""Those that the tests' own environment may lack."""


def need(target: str) -> None:
    if target in RUNTIMES:
        pytest.importorskip(RUNTIMES[target], reason=f"pip install 'wrapq[{target}]', which takes minutes")


def targets() -> list[str]:
    return [preset.name for preset in list_presets() if preset.kind == "export" and preset.name != "none"]


def test_no_target_and_no_recipe_of_one_is_left_out() -> None:
    runs = {(target, row.model) for row in ROWS for target in row.targets}
    expected = {(target, kind) for target in targets() for kind in (SHIPPED, DOCS, *MODULES)}
    assert runs | CELLS.keys() | REFUSED.keys() == expected and not CELLS.keys() & REFUSED.keys()
    recipes = [preset.name for preset in list_presets() if preset.kind == "recipe"]
    assert {name for name in recipes if compose([f"recipe={name}"]).recipe.export} <= {row.recipe for row in ROWS}


def language_rows() -> Iterable[Any]:
    return (pytest.param(row, marks=row.marks, id=f"{row.model} {'+'.join(row.targets)}") for row in ROWS)


@pytest.mark.parametrize("row", language_rows())
def test_a_run(row: Row, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for target in row.targets:
        need(target)
    if "gptq" in row.targets:
        python = request.getfixturevalue("gptqmodel")
        site = (python.parents[1] / "lib").glob("*/site-packages")
        monkeypatch.setattr(sys, "executable", str(python))  # which reads exports
        monkeypatch.setattr(sys, "path", [*sys.path, *map(str, site)])  # where packages are found
    words = [*SMALL, f"paths.outputs={tmp_path}", "export=none"]
    words += [f"+export.{target}={{beside_float: false}}" for target in row.targets]
    composed = compose([f"recipe={row.recipe}", "export=none"])
    words += CALIBRATED if resolve(composed.recipe, composed.sources).needs_calibration else ()
    if row.model == DOCS:
        words += ["model=hf", f"model.path={request.getfixturevalue('shared_models') / DOCS}"]
    done = wrapq.run(row.recipe, words)
    assert done is not None and done.exports.keys() == row.targets.keys()
    check_recipe(done, row.recipe)
    for target, allowed in row.targets.items():
        made, figures = done.exports[target], done.exports[target].figures
        print(target, f"error {made.error:.2g}", {name: round(value, 3) for name, value in figures.items()})
        exact = allowed <= EXACT
        top1, greedy = LEAST.get(target, ORDINARY) if row.model == SHIPPED else ORDINARY
        assert made.error <= allowed and figures["top1_agreement"] >= (1 if exact else top1), target
        assert figures["greedy_agreement"] >= (1 if exact else greedy) and figures["token_ms"] > 0, target
        assert figures["first_token_ms"] > 0 and figures["size_mb"] == made.size / 1e6 > 0, target
        files, note = WRITTEN.get(target, ((), ""))
        assert not files or made.size == sum((made.path / file).stat().st_size for file in files), target
        assert any(note in each for each in made.notes) or not note, target
        if (target, row.model) == ("openvino", SHIPPED):  # which has few weights that stay float, stored in float32
            assert made.size < 1.2 * (done.folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("target", "kind"), [pytest.param(*cell, marks=marks, id=" ".join(cell)) for cell, marks in CELLS.items()]
)
def test_a_module(target: str, kind: str, tmp_path: Path) -> None:
    need(target)
    model, example, other = quantized(kind, target)
    made = wrapq.export_module(model, target, tmp_path / "made", example)
    assert made.error < STEP and made.figures["cosine"] > 0.999
    assert made.figures["latency_ms"] > 0 and made.figures["size_mb"] == made.size / 1e6 > 0
    check_other_sizes(target, tmp_path / "made", model, other)


@pytest.mark.parametrize(("target", "kind"), REFUSED)
def test_what_a_target_does_not_take_is_refused(target: str, kind: str, tmp_path: Path) -> None:
    model, example, _ = quantized(kind, target)
    with pytest.raises(PlanError, match=REFUSED[target, kind]):
        wrapq.export_module(model, target, tmp_path / "made", example)
    assert not list(tmp_path.iterdir())
