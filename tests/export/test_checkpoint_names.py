"""Experts under the names that checkpoints of their family have, which readers make their own tensors of."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import MixtralConfig, MixtralForCausalLM

import wrapq
from tests.export.conftest import HERE, SMALL, weights
from tests.exports import export_of
from tests.models import random_model
from wrapq.export.checkpoint_names import checkpoint_names

ATTENTION = "+rules.attention={match: {name: '*.self_attn.*', type: Linear}, weight: 'int8:channel'}"


@pytest.mark.parametrize(
    ("model", "layer", "expected"),
    [
        ("MixtralForCausalLM", "mlp.experts.3.gate_proj", "block_sparse_moe.experts.3.w1"),
        ("MixtralForCausalLM", "mlp.experts.3.down_proj", "block_sparse_moe.experts.3.w2"),
        ("PhimoeForCausalLM", "mlp.experts.0.up_proj", "block_sparse_moe.experts.0.w3"),
        ("PhimoeForCausalLM", "mlp.router", "block_sparse_moe.gate"),
        ("PhimoeForCausalLM", "self_attn.q_proj", "self_attn.q_proj"),
        ("Qwen2MoeForCausalLM", "mlp.experts.0.up_proj", "mlp.experts.0.up_proj"),
    ],
)
def test_names(model: str, layer: str, expected: str) -> None:
    names = checkpoint_names(model)
    assert names is not None
    assert names.of_module(f"model.layers.0.{layer}") == f"model.layers.0.{expected}"
    assert names.of(f"model.layers.0.{layer}.weight") == f"model.layers.0.{expected}.weight"


def test_a_configuration_names_experts_of_gpt_oss_by_one_pattern() -> None:
    """vLLM looks for `gate_proj`, `up_proj` and `down_proj` of the first one, and gives names that end so others."""
    names = checkpoint_names("GptOssForCausalLM")
    assert names is not None
    pattern = names.of_module("model.layers.1.mlp.experts.0.gate_up_proj").removeprefix("re:")
    assert re.match(pattern, "model.layers.1.mlp.experts.0.up_proj")
    assert not re.match(pattern, "model.layers.11.mlp.experts.0.up_proj")
    assert names.of_module("model.layers.1.self_attn.q_proj") == "model.layers.1.self_attn.q_proj"
    packed = names.of("model.layers.1.mlp.experts.0.down_proj.weight_packed")
    assert packed == "model.layers.1.mlp.experts.0.w2_weight_packed"


def test_they_are_those_that_transformers_saves_itself(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, vocab_size=32))
    model.save_pretrained(tmp_path)
    names = checkpoint_names("MixtralForCausalLM")
    assert names is not None
    parts = [f"model.layers.0.mlp.experts.1.{part}.weight" for part in names.parts]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {*map(names.of, parts), names.of("model.layers.0.mlp.gate.weight")} <= set(file.keys())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "more"), [("mixtral", (ATTENTION,)), ("phimoe", ()), ("granitemoe", ()), ("gpt_oss", ())]
)
def test_transformers_reads_them(family: str, more: tuple[str, ...], tmp_path: Path) -> None:
    path = f"model.path={random_model(family, tmp_path / 'model')}"
    recipe, *words = weights("int4:g32:sym", *more)
    chosen = [*words, *SMALL, *HERE, "model=hf", path, f"paths.outputs={tmp_path}", "evaluation.tokens=256"]
    run = wrapq.run(recipe.removeprefix("recipe="), chosen)
    assert run is not None and export_of(run).error < 1e-5
    section = json.loads((export_of(run).path / "config.json").read_text())["quantization_config"]
    first = next(iter(section["config_groups"].values()))
    assert first["weights"]["num_bits"] == 4  # transformers takes the first group for that of experts
