"""GGUF files, from recipes to what llama.cpp computes."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

import wrapq
from tests.export.test_lowering import converted, logits, off
from tests.export.test_onnx_model import CALIBRATED, SMALL
from tests.export.test_refusals import planned
from tests.exports import export_of
from tests.models import DEMO, random_model
from wrapq.engine.export import export_run
from wrapq.engine.progress import Progress
from wrapq.errors import ModelError, PlanError
from wrapq.export.gguf.ggml_types import NEAREST
from wrapq.export.gguf.writer import write_gguf
from wrapq.export.gguf_model import Gguf
from wrapq.export.run_gguf import MODEL
from wrapq.recipe.schema import Export, Settings

pytest.importorskip("gguf")
ROUNDED = 2e-2
"""By llama.cpp's own rounding of inputs to 8 bits, and of keys and values to half precision."""
ROUNDED_BY_256 = 4e-2
"""What k-quants multiply is rounded with one scale for 256 of them, not for 32."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {},
    "gemma3": {},
    "phi3": {},
    "gpt2": {"n_positions": 512},
}
LONG = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG |= {"original_max_position_embeddings": 32}


def needs_llama_cpp() -> None:
    pytest.importorskip("llama_cpp", reason="pip install 'wrapq[gguf]' compiles llama.cpp, which takes minutes")


def error_in_llama_cpp(model: nn.Module, folder: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.save_pretrained(folder)
    write_gguf(model, tokenizer, folder / MODEL, "test", torch.float32)
    ids = torch.randint(0, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
    reading = Gguf().read(folder, ids, "cpu")
    assert reading.tokens is not None and reading.tokens.shape == (1, 32)
    assert reading.measured["token_ms"] > 0 and reading.measured["peak_mb"] > 0
    return off(reading.logits, logits(model, ids))


def tiny(make_model: Callable[..., nn.Module], family: str, spec: str, **changes: Any) -> nn.Module:
    norms = "*ln_*" if family == "gpt2" else "*norm*"
    model = make_model(family, vocab_size=2048, max_position_embeddings=512, **FAMILIES[family], **changes)
    return converted(model, spec, None, **{norms: {"weight": None}})


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same(family: str, make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    needs_llama_cpp()
    assert error_in_llama_cpp(tiny(make_model, family, NEAREST["q8_0"]), tmp_path) <= ROUNDED


@pytest.mark.slow
@pytest.mark.parametrize("kind", [name for name in NEAREST if name != "q8_0"])
def test_llama_cpp_reads_every_type(kind: str, make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    needs_llama_cpp()
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64} if kind.endswith("_k") else {}
    allowed = ROUNDED_BY_256 if wide else ROUNDED
    assert error_in_llama_cpp(tiny(make_model, "llama", NEAREST[kind], **wide), tmp_path) <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("rope", [LONG, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}])
def test_rotary_embeddings(rope: dict[str, Any], make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    needs_llama_cpp()
    model = tiny(make_model, "llama", NEAREST["q8_0"], rope_parameters=rope, attention_bias=True)
    assert error_in_llama_cpp(model, tmp_path) <= ROUNDED


@pytest.mark.slow
def test_a_run_exports_what_it_measured(tmp_path: Path) -> None:
    needs_llama_cpp()
    words = [*CALIBRATED, *SMALL, "model.dtype=bfloat16", "goals.export_token_ms=1000"]
    done = wrapq.run("gguf_q4_0", [*words, f"paths.outputs={tmp_path}"])
    assert export_of(done).error <= 3e-2
    assert done.figures["export_top1_agreement"] > 0.9 and done.figures["export_first_token_ms"] > 0
    assert export_of(done).size == (export_of(done).path / MODEL).stat().st_size
    assert {MODEL, "tokenizer.json"} <= {file.name for file in export_of(done).path.iterdir()}
    assert any("llama-cli" in note for note in export_of(done).notes)


@pytest.mark.slow
def test_a_finished_run_is_exported_later_to_the_same_bytes(tmp_path: Path) -> None:
    needs_llama_cpp()
    done = wrapq.run("gguf_q8_0", [*SMALL, "export.gguf.beside_float=false", f"paths.outputs={tmp_path}"])
    wanted = {"gguf": Export(beside_float=False)}
    again = export_run(str(done.folder), wanted, Settings(), Progress(), tmp_path / "again")
    assert again["gguf"].path == tmp_path / "again"
    assert (again["gguf"].path / MODEL).read_bytes() == (export_of(done).path / MODEL).read_bytes()


@pytest.mark.slow
def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    needs_llama_cpp()
    (tmp_path / MODEL).write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"llama.cpp does not run the export: "):
        Gguf().read(tmp_path, torch.arange(8)[None], "cpu")


@pytest.mark.slow
def test_another_tokenizer_is_told(make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    needs_llama_cpp()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    write_gguf(make_model("llama", vocab_size=2048), tokenizer, tmp_path / MODEL, "test", torch.float32)
    tokenizer.backend_tokenizer.pre_tokenizer.use_regex = False
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"does not run the export: it makes other tokens of '.*' than the tokenizer"):
        Gguf().read(tmp_path, torch.arange(8)[None], "cpu")


OF_GROUPS = "weight in int4:g128:sym: no type of ggml that wrapq writes holds its codes\n"


@pytest.mark.parametrize(
    ("words", "reasons"),
    [
        (["recipe=w4a16_rtn"], [f"{OF_GROUPS}    the nearest that it has is {NEAREST['q4_0']} (q4_0)"]),
        (
            ["recipe=w8a8_static"],
            ["input in int8:tensor:asym: llama.cpp rounds what it multiplies and keeps by itself"],
        ),
        (["recipe=gguf_q8_0", "float_prefix=1"], ["no word for first tokens that stay float"]),
        (
            ["recipe=gguf_q8_0", "+algorithm@stack.low=low_rank", "stack.low.rules=[linear]"],
            ["llama.cpp has no word for a low-rank repair", "~stack.low"],
        ),
        (
            ["recipe=gguf_q8_0", "+rules.norm={match: {type: RMSNorm}, weight: 'int8:g32'}"],
            ["matrices, not LlamaRMSNorm"],
        ),
    ],
)
def test_the_plan_refuses_what_llama_cpp_cannot_say(words: list[str], reasons: list[str]) -> None:
    with pytest.raises(PlanError) as refused:
        planned(*words, "export=gguf")
    assert all(reason in str(refused.value) for reason in reasons), str(refused.value)


def test_a_model_that_llama_cpp_is_not_told_of(tmp_path: Path) -> None:
    path = random_model("opt", tmp_path)
    with pytest.raises(PlanError, match=r"wrapq writes no OPTForCausalLM for llama\.cpp, but LlamaForCausalLM"):
        planned("recipe=gguf_q8_0", "model=hf", f"model.path={path}", "export=gguf")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("wrapq.export.base.version", absent)
    with pytest.raises(PlanError, match=r"with gguf and llama-cpp-python, which are not installed\n.*wrapq\[gguf\]"):
        planned("recipe=gguf_q8_0", "export=gguf")
