"""Programs of `torch.export`, from recipes to the logits that torch computes from the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wrapq
from tests.export.test_refusals import planned
from tests.exports import export_of
from wrapq.engine.record import RunResult
from wrapq.errors import ModelError, PlanError
from wrapq.export.run_program import PROGRAM
from wrapq.export.torch_export import TorchExport

pytest.importorskip("torchao")

SMALL = ("evaluation.tokens=1024", "evaluation.seq_len=128", "tracking=none", "runtime.kernels=reference")
EXPORT, CALIBRATED = "export=torch_export", ("calibration.samples=4", "calibration.seq_len=64")
ALONE = "export.torch_export.beside_float=false"
CASES = {
    "w8a8_static": (["recipe=w8a8_static", *CALIBRATED], 5e-2),
    "w8a8_dynamic": (["recipe=w8a8_dynamic"], 5e-2),
    "w4a4_rotated_gptq": (["recipe=w4a4_rotated_gptq", *CALIBRATED], 0.25),  # which rotates at each forward
    "bfloat16": (["recipe=w8a8_static", "model.dtype=bfloat16", *CALIBRATED], 5e-2),
    "int16_activations": (["recipe=int16_activations", *CALIBRATED], 1e-2),
}


def finished(words: list[str], folder: Path) -> RunResult:
    run = wrapq.run(words[0].removeprefix("recipe="), [*words[1:], *SMALL, EXPORT, ALONE, f"paths.outputs={folder}"])
    assert run is not None
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_exports_what_it_measured(name: str, tmp_path: Path) -> None:
    words, allowed = CASES[name]
    run = finished(words, tmp_path)
    assert export_of(run).error <= allowed
    assert {PROGRAM, "tokenizer.json"} <= {file.name for file in export_of(run).path.iterdir()}
    assert export_of(run).size == (export_of(run).path / PROGRAM).stat().st_size
    assert any("torch.export.load" in note for note in export_of(run).notes)
    found = export_of(run).figures
    assert found["greedy_agreement"] >= 0.1 and 0 < found["token_ms"] < 5000  # from one other token on, all are others


@pytest.mark.slow
def test_a_finished_run_is_exported_later_to_the_same_bytes_and_strictly(tmp_path: Path) -> None:
    run = finished(["recipe=w8a8_static", *CALIBRATED], tmp_path)
    command = [sys.executable, "-m", "wrapq", "export", str(run.folder), EXPORT, ALONE]
    for target, more in (("again", ()), ("strict", ("export.torch_export.strict=true",))):
        subprocess.run([*command, *more, "--to", str(tmp_path / target)], check=True, capture_output=True)
    first, again = (torch.export.load(folder / PROGRAM) for folder in (export_of(run).path, tmp_path / "again"))
    assert str(first.graph) == str(again.graph)
    assert all(torch.equal(tensor, again.state_dict[name]) for name, tensor in first.state_dict.items())
    ids = torch.arange(3 * 20).view(3, 20)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    strict = torch.export.load(tmp_path / "strict" / PROGRAM).module()
    torch.testing.assert_close(strict(**given), first.module()(**given))


@pytest.mark.parametrize(
    ("words", "reasons"),
    [
        (["rules.linear.weight=nf4:g32"], ["weight in nf4:g32", "operators for integers and fp8, not for nf4"]),
        (["rules.linear.input=mxfp8:dyn"], ["scales found as tokens come are float32, not e8m0"]),
        (["float_prefix=1"], ["no operator says that first tokens stay float"]),
    ],
)
def test_the_plan_refuses_what_the_operators_cannot_say(words: list[str], reasons: list[str]) -> None:
    with pytest.raises(PlanError) as refused:
        planned("recipe=w4a16_rtn", *words, EXPORT)
    assert all(reason in str(refused.value) for reason in reasons)


def test_a_damaged_program_is_told(tmp_path: Path) -> None:
    (tmp_path / PROGRAM).write_bytes(b"PK nothing")
    with pytest.raises(ModelError, match=r"torch.export.load does not run the export: "):
        TorchExport().read(tmp_path, torch.arange(8)[None], "cpu")


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(PlanError, match="there is no C\\+\\+ compiler here\n    install g"):
        planned("recipe=w8a8_static", "export=aot_inductor")
