"""What a GGUF file holds, as the package gguf reads it: wrapq's codes, to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.test_lowering import converted
from tests.models import DEMO
from wrapq.errors import ModelError
from wrapq.export.gguf.architectures import ARCHITECTURES, file_rows, why_not
from wrapq.export.gguf.ggml_types import NEAREST, blocks, nearest_type, type_of
from wrapq.export.gguf.writer import write_gguf
from wrapq.observers.base import observe_tensor
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec

gguf = pytest.importorskip("gguf")

MINIMUM = 5e-4
"""Relative to the largest weight, where a minimum in half precision stands for a zero point."""
WIDTH = 512


def dequantized(data: np.ndarray, kind: str) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(np.array(data), gguf.GGMLQuantizationType[kind.upper()]))


def file_of(model: nn.Module, folder: Path) -> dict[str, object]:
    """The tensors of the model's file by their names."""
    write_gguf(model, AutoTokenizer.from_pretrained(DEMO), folder / "model.gguf", "test", torch.float32)
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


SPECS = [*NEAREST.items(), ("q4_0", "int4:g32:sym:signed:scale=float16"), ("q4_0", "uint4:g32:sym:scale=float16")]
SPECS += [("q8_0", "uint8:g32:sym:scale=float16"), ("q4_1", "int4:g32:asym:scale=float16"), ("q8_0", "mxint8")]
SPECS += [("q4_1", "uint4:g32:asym:scale=float16"), ("q5_1", "uint5:g32:asym:zero=float:scale=float16")]
SPECS += [("q6_k", "int6:g16:scale=int8")]


@pytest.mark.parametrize(("kind", "text"), SPECS, ids=[text for _, text in SPECS])
def test_a_type_holds_the_codes(kind: str, text: str) -> None:
    spec = QuantSpec.parse(text)
    weight = torch.randn(8, WIDTH) * torch.logspace(-3, 1, 8)[:, None]
    weight[0] = 0
    qparams = observe_tensor(weight, spec, "weight")
    codes = qparams.quantize(weight)
    found, expected = dequantized(blocks(codes, qparams, "weight"), kind), qparams.dequantize(codes, torch.float32)
    assert type_of(spec) == kind
    if spec.symmetric or spec.zero_point == "min":
        assert torch.equal(found, expected)
    else:
        assert (found - expected).abs().max() <= MINIMUM * expected.abs().max()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("int4:g128:sym", "q4_0"),
        ("uint3:g32:asym", "q4_1"),
        ("int5:channel:sym", "q5_0"),
        ("int8:channel", "q8_0"),
        ("uint8:g32:asym", "q8_0"),
        ("int6:g32", "q8_0"),
        ("uint4:g16:asym:scale=uint6:zero=min", "q4_k"),
        ("nf4:g32", "mxfp4"),
        ("nvfp4", "mxfp4"),
        ("fp8_e4m3:b128x128", "q8_0"),
    ],
)
def test_the_nearest_type(text: str, kind: str) -> None:
    assert type_of(QuantSpec.parse(text)) is None and nearest_type(QuantSpec.parse(text)) == kind
    assert type_of(QuantSpec.parse(NEAREST[kind])) == kind


def test_what_no_block_holds() -> None:
    spec = QuantSpec.parse("int4:g32:sym")
    codes = torch.zeros(2, 64, dtype=torch.int8)
    with pytest.raises(ModelError, match="too large for it"):
        blocks(codes, QParams(spec, torch.full((2, 2), 1e5)), "weight")
    with pytest.raises(ModelError, match="activation order"):
        blocks(codes, QParams(spec, torch.ones(2, 2), permutation=torch.arange(64)), "weight")


def test_the_shipped_model(tmp_path: Path) -> None:
    floats = {"*norm*": {"weight": None}, "lm_head": {"weight": None}, "*embed*": {"weight": "int8:g32:scale=float16"}}
    shipped = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    model = converted(shipped, "int4:g32:sym:signed:scale=float16", None, **floats)
    tensors, config = file_of(model, tmp_path), model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    kinds = []
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is None:
            continue
        written = tensors.pop(names.get_name(f"{name}.weight", try_suffixes=(".weight",)))
        rows = file_rows(f"{name}.weight", config, ARCHITECTURES["LlamaForCausalLM"])
        weight = module.weight if rows is None else module.weight[rows]
        assert torch.equal(dequantized(written.data, written.tensor_type.name), weight.float()), name
        kinds.append(written.tensor_type.name)
    assert Counter(kinds) == {"Q8_0": 1, "Q4_0": 28, "F32": 10} and not tensors


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_equal_models_give_equal_bytes(family: str, make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = converted(make_model(family, vocab_size=2048), "mxfp4", None)
    files = [tmp_path / name for name in "ab"]
    for folder in files:
        folder.mkdir()
        tensors = file_of(model, folder)
    assert len({(folder / "model.gguf").read_bytes() for folder in files}) == 1
    assert ("output.weight" in tensors) == (not model.config.tie_word_embeddings)


@pytest.mark.slow
def test_a_head_that_llama_cpp_has_no_place_for(make_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = make_model("gemma2", vocab_size=2048, tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"llama\.cpp's gemma2 has no lm_head\.weight"):
        file_of(model, tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "llama.cpp's llama has hidden_act silu, not gelu"),
        ("qwen3", {"attention_bias": True}, "qwen3 has attention_bias False, not True"),
        ("qwen2", {"head_dim": 32}, "heads that are together as wide as the hidden state"),
        ("gemma3", {"query_pre_attn_scalar": 32}, "divides queries by the root of 16, and query_pre_attn_scalar is 32"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "has scale_attn_by_inverse_layer_idx False"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rotary embeddings of type dynamic are not written",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(
    family: str, changes: dict[str, object], reason: str, make_model: Callable[..., nn.Module]
) -> None:
    model = make_model(family)
    architecture = ARCHITECTURES[type(model).__name__]
    assert not list(why_not(model.config, architecture))
    for key, value in changes.items():
        setattr(model.config, key, value)
    (found,) = why_not(model.config, architecture)
    assert reason in found
