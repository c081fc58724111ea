"""ONNX models in onnxruntime: they compute what the converted model does, token by token too."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import wrapq
from tests.export.test_lowering import converted, logits, off
from tests.export.test_refusals import planned
from tests.exports import export_of
from tests.models import random_model
from wrapq.errors import ModelError, PlanError
from wrapq.export import onnx_model
from wrapq.export.onnx_model import Onnx
from wrapq.export.run_onnx import MODEL, nothing_before
from wrapq.export.stopwatch import LOGITS, PAST, PRESENT
from wrapq.runs.folder import RunFolder

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXACT, STEP, COARSE_STEP = 1e-5, 5e-2, 0.1
"""Sums in another order; and where those decide to which side a number between two steps falls."""
CASES: dict[str, tuple[str, str | None, float]] = {
    "int4 groups": ("int4:g16:sym", None, EXACT),
    "uint4 groups with zero points": ("uint4:g16:asym", None, EXACT),
    "uint8 groups with zero points": ("uint8:g16:asym", None, EXACT),
    "int3 groups": ("int3:g16:sym", None, EXACT),
    "groups that no product takes": ("int4:g8:sym", None, EXACT),
    "int8 channel, static": ("int8:channel", "int8:tensor:asym", STEP),
    "int8 tensor, int16": ("int8:tensor", "int16:tensor:sym", STEP),
    "int4 channel, uint8": ("int4:channel", "uint8:tensor:asym", STEP),
    "int8 channel, int4": ("int8:channel", "int4:tensor:asym", COARSE_STEP),
    "int8 channel, uint6": ("int8:channel", "uint6:tensor:asym", STEP),
    "input channels": ("int8:channel@1", None, EXACT),
    "blocks with a ragged edge": ("int8:b24x24", None, EXACT),
    "dynamic, asymmetric": ("int4:g16:sym", "int8:token:asym:dyn", STEP),
    "dynamic, symmetric": ("int8:channel", "int8:token:sym:dyn", STEP),
    "dynamic, asymmetric bytes": ("int8:channel", "int8:token:asym:dyn", STEP),
    "dynamic, unsigned": ("uint8:channel:asym", "uint8:token:asym:dyn", STEP),
    "dynamic groups": ("int8:channel", "int8:g16:asym:dyn", STEP),
    "dynamic, of all tokens": ("int8:channel", "int8:tensor:asym:dyn", STEP),
    "16 bits": ("int8:channel:scale=bfloat16", "uint16:tensor:asym", STEP),
}


def session_of(model: nn.Module, folder: Path) -> Any:
    import onnx_ir

    onnx_ir.save(onnx_model.onnx_model(model), folder / "model.onnx")
    return onnxruntime.InferenceSession(str(folder / "model.onnx"))


def run(session: Any, ids: Tensor, mask: Tensor | None = None, past: dict[str, Any] | None = None) -> dict[str, Any]:
    mask = torch.ones_like(ids) if mask is None else mask
    past = nothing_before(session, len(ids)) if past is None else past
    names = [each.name for each in session.get_outputs()]
    given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **past}
    return dict(zip(names, session.run(names, given), strict=True))


FAST = ("int4 groups", "int8 channel, static", "dynamic, asymmetric")
SLOW = [name for name in CASES if name not in FAST]


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_it_computes_the_same(name: str, make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    weight, activation, allowed = CASES[name]
    model = converted(make_model("llama"), weight, activation)
    session = session_of(model, tmp_path)
    ids = torch.randint(0, 60, (3, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = torch.from_numpy(run(session, ids, mask)[LOGITS])
    assert off(found[mask.bool()], logits(model, ids, mask)[mask.bool()]) <= allowed


FAMILIES = ("gpt2", "gemma3", "opt", "qwen3")


@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def test_tokens_one_by_one_are_those_of_all_at_once(
    family: str, make_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = converted(make_model(family), "int4:g16:sym", None)
    session = session_of(model, tmp_path)
    ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = torch.from_numpy(run(session, ids)[LOGITS])
    assert off(whole, logits(model, ids)) <= EXACT
    past, found = nothing_before(session, 2), []
    for start, stop in ((0, 7), *((i, i + 1) for i in range(7, 12))):
        done = run(session, ids[:, start:stop], torch.ones(2, stop, dtype=ids.dtype), past)
        past = {name.replace(PRESENT, PAST): value for name, value in done.items() if name != LOGITS}
        found.append(done[LOGITS])
    assert off(torch.from_numpy(np.concatenate(found, 1)), whole) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weight", "activation", "operators", "types"),
    [
        ("int4:g16:sym", None, {"MatMulNBits"}, {"UINT8"}),
        ("int4:channel", "int8:tensor:asym", {"QuantizeLinear", "DequantizeLinear"}, {"INT4"}),
        ("int8:channel", "int8:tensor:asym", {"QuantizeLinear", "DequantizeLinear"}, {"INT8"}),
    ],
)
def test_weights_are_as_small_as_onnx_has_them(
    weight: str,
    activation: str | None,
    operators: set[str],
    types: set[str],
    make_model: Callable[..., nn.Module],
    tmp_path: Path,
) -> None:
    import onnx

    floats = {"*embed*": {"weight": None}, "*norm*": {"weight": None}}
    session_of(converted(make_model("llama"), weight, activation, **floats), tmp_path)
    written = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(written)
    assert operators <= set(Counter(node.op_type for node in written.graph.node))
    codes = [each for each in written.graph.initializer if len(each.dims) >= 2 and each.data_type != 1]
    assert {onnx.TensorProto.DataType.Name(each.data_type) for each in codes} == types


@pytest.mark.slow
def test_onnxruntime_multiplies_integers(make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    import onnx

    floats = {"*embed*": {"weight": None}, "*norm*": {"weight": None, "input": None, "output": None}}
    model = converted(make_model("llama"), "int8:channel", "int8:tensor:asym", **floats)
    session_of(model, tmp_path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options)
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    quantized = sum(
        isinstance(module, nn.Linear) and "Quantized" in type(module).__name__ for module in model.modules()
    )
    assert sum(count for name, count in operators.items() if name.startswith(("MatMulInteger", "QLinear"))) >= quantized


@pytest.mark.slow
def test_a_quantized_table_and_every_point(make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    overrides = {"*embed*": {"weight": "int4:g16:sym"}}
    for weight, activation in (("int4:g16:sym", None), ("int8:channel", "int16:tensor:sym")):
        model = converted(make_model("llama"), weight, activation, **overrides)
        session = session_of(model, tmp_path)
        ids = torch.arange(20).view(2, 10)
        assert off(torch.from_numpy(run(session, ids)[LOGITS]), logits(model, ids)) <= STEP


SMALL = ("evaluation.tokens=1024", "evaluation.seq_len=128", "tracking=none", "runtime.kernels=reference")
ALONE = "export.onnx.beside_float=false"
CALIBRATED = ("calibration.samples=4", "calibration.seq_len=64")
RUNS = {
    "w8a8_dynamic": ((), STEP),
    "int16_activations": (CALIBRATED, STEP),
    "w4a4_rotated_gptq": (CALIBRATED, 0.25),  # which rotates at each forward
    "w8a8_static": ((*CALIBRATED, "model.dtype=bfloat16"), STEP),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RUNS)
def test_a_run_exports_what_it_measured(recipe: str, tmp_path: Path) -> None:
    words, allowed = RUNS[recipe]
    words = [*words, *SMALL, "export=onnx", ALONE, "goals.export_token_ms=1000", "goals.export_greedy_agreement=0.5"]
    done = wrapq.run(recipe, [*words, f"paths.outputs={tmp_path}"])
    assert export_of(done).error <= allowed
    assert done.figures["export_size_mb"] == export_of(done).size / 1e6
    assert done.goals["export_token_ms"].met and done.figures["export_first_token_ms"] > 0
    assert {MODEL, "tokenizer.json"} <= {file.name for file in export_of(done).path.iterdir()}
    assert export_of(done).size == (export_of(done).path / MODEL).stat().st_size
    assert any("onnxruntime.InferenceSession" in note for note in export_of(done).notes)


@pytest.mark.slow
def test_a_finished_run_is_exported_later_to_the_same_bytes(tmp_path: Path) -> None:
    done = wrapq.run("onnx_w8a8", [*CALIBRATED, *SMALL, ALONE, f"paths.outputs={tmp_path}"])
    command = [
        sys.executable,
        "-m",
        "wrapq",
        "export",
        str(done.folder),
        "export=onnx",
        ALONE,
        "--to",
        str(tmp_path / "again"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "again" / MODEL).read_bytes() == (export_of(done).path / MODEL).read_bytes()


@pytest.mark.slow
def test_weights_too_large_for_one_file(
    make_model: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_model, "_LARGEST", 1000)
    model, exporter = converted(make_model("llama"), "int4:g16:sym", None), Onnx()
    monkeypatch.setattr(exporter, "check", lambda plan: ())
    exporter.export(model, None, RunFolder(tmp_path))  # type: ignore[arg-type] - which only check reads
    assert {file.name for file in tmp_path.iterdir()} == {MODEL, f"{MODEL}.data"}
    ids = torch.arange(20).view(2, 10)
    assert off(exporter.read(tmp_path, ids, "cpu").logits, logits(model, ids)) <= EXACT


@pytest.mark.parametrize(
    ("words", "reasons"),
    [
        (["rules.linear.weight=nf4:g32"], ["weight in nf4:g32", "operators for integers and fp8, not for nf4"]),
        (["float_prefix=1"], ["no operator says that first tokens stay float"]),
    ],
)
def test_the_plan_refuses_what_onnx_cannot_say(words: list[str], reasons: list[str]) -> None:
    with pytest.raises(PlanError) as refused:
        planned("recipe=w4a16_rtn", *words, "export=onnx")
    assert all(reason in str(refused.value) for reason in reasons)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("wrapq.export.base.version", absent)
    with pytest.raises(
        PlanError,
        match=r"with torchao and onnxscript and onnxruntime, which are not installed\n.*wrapq\[onnx\]",
    ):
        planned("recipe=w4a16_rtn", "export=onnx")


def test_a_damaged_model_is_told(tmp_path: Path) -> None:
    (tmp_path / MODEL).write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"onnxruntime does not run the export: "):
        Onnx().read(tmp_path, torch.arange(8)[None], "cpu")


def test_a_model_that_keeps_a_state(make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="keeps more of tokens than keys and values"):
        onnx_model.onnx_model(make_model("mamba"))
    path, words = random_model("mamba", tmp_path), ["model=hf", "rules.linear.weight=int8:channel"]
    with pytest.raises(PlanError, match="MambaForCausalLM keeps more of tokens"):
        planned("recipe=w8a16", *words, f"model.path={path}", "export=onnx")
