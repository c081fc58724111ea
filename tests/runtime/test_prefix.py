"""First tokens that stay float: the same as keys and values computed once, in float, and kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import wrapq
from tests.conftest import build_model
from wrapq import PTQConfig, calibrate, convert, load, padding, prepare
from wrapq.resolve.plan import Plan
from wrapq.runs.checkpoint import save_model
from wrapq.runs.folder import RunFolder
from wrapq.runtime.choose import choose_kernels
from wrapq.runtime.prefix import current_prefix, keep_prefix, prefix_tokens
from wrapq.wrappers.model import iter_quantizers
from wrapq.wrappers.quantizer import WeightQuantizer

SPECS = ["int8:tensor:asym", "int8:token:sym:dyn", "int8:tensor:sym:dyn"]
FAMILIES = {
    "llama": ("*.self_attn", "*.embed_tokens"),
    "gemma3": ("*.self_attn", "*.embed_tokens"),
    "gpt2": ("*.attn", "*.wte"),
}
"""The names of attention and embedding."""


def config(family: str, text: str) -> PTQConfig:
    attention, embedding = FAMILIES[family]
    cache = {"key": "int4:token:asym:dyn", "value": "int4:token:asym:dyn"}
    kept = {"lm_head": None, embedding: None, attention: cache}
    return PTQConfig(weight="int8:channel", activation=text, overrides=kept)


def quantized(family: str, text: str, ids: list[Tensor], tokens: int = 2) -> nn.Module:
    model = build_model(family)
    keep_prefix(model, tokens)
    model = prepare(model, config(family, text))
    calibrate(model, ids, stack={"ranges": "ranges", "round": "rtn"} if "dyn" not in text else {"round": "rtn"})
    return model


def float_prefix_cache(model: nn.Module, ids: Tensor) -> DynamicCache:
    """The keys and values of `ids` with all activations float."""
    points = [point for point in iter_quantizers(model) if not isinstance(point, WeightQuantizer)]
    for point in points:
        point.enabled = False
    cache = model(ids, use_cache=True).past_key_values
    for point in points:
        point.enabled = True
    return cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", SPECS)
@torch.no_grad()
def test_it_is_a_cache_computed_once(family: str, text: str, token_batches: list[Tensor]) -> None:
    model, ids = quantized(family, text, token_batches), token_batches[1]
    whole = model(ids).logits
    cache = float_prefix_cache(model, ids[:, :2])
    rest = model(ids[:, 2:], past_key_values=cache).logits
    without = quantized(family, text, token_batches, tokens=0)(ids).logits[:, 2:]
    # a number on the edge between two codes may fall to the other side, and moves one token by a step
    apart, moved = (float((each - whole[:, 2:]).norm()) for each in (rest, without))
    assert apart < 0.1 * moved and float((rest - whole[:, 2:]).abs().median()) < 1e-5


@torch.no_grad()
def test_padding_comes_before_it(token_batches: list[Tensor]) -> None:
    model, ids = quantized("llama", "int8:tensor:asym", token_batches), token_batches[1]
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1)
    mask = torch.cat([torch.zeros_like(ids[:, :3]), torch.ones_like(ids)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with padding(mask):
        logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_it_does_not_enter_statistics(token_batches: list[Tensor]) -> None:
    ids = token_batches[1]
    seen = []
    for tokens in (0, ids.shape[1] - 1):
        model = build_model("llama")
        keep_prefix(model, tokens)
        model = prepare(model, config("llama", "int8:tensor:asym"))
        model(ids)
        point = next(p for p in iter_quantizers(model) if p.where == "model.layers.0.mlp.down_proj.input")
        low, high = point.observer.range()  # type: ignore[union-attr]
        seen.append(float(high - low))
    assert seen[1] < seen[0]


@torch.no_grad()
def test_it_is_saved_loaded_and_generates(token_batches: list[Tensor], tmp_path: Path) -> None:
    model = quantized("llama", "int8:tensor:asym", token_batches)
    ids = token_batches[1]
    fake = model(ids).logits
    model = convert(model)
    torch.testing.assert_close(model(ids).logits, fake, rtol=1e-5, atol=1e-5)
    text = model.generate(ids[:, :6], max_new_tokens=5, do_sample=False)
    assert torch.equal(model(text[:, :-1]).logits[:, 5:].argmax(-1), text[:, 6:]), "one pass and a cache agree"
    save_model(model, RunFolder(tmp_path))
    loaded = load(tmp_path)
    assert prefix_tokens(loaded) == 2 and torch.equal(loaded(ids).logits, model(ids).logits)
    choose_kernels(loaded, "int8_mm")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_failed_forward_leaves_nothing_behind(token_batches: list[Tensor]) -> None:
    model, ids = quantized("llama", "int8:tensor:asym", token_batches), token_batches[1]
    expected = model(ids).logits
    with pytest.raises(IndexError):
        model(torch.full_like(ids, 10**6))
    assert current_prefix() is None
    assert torch.equal(model(ids).logits, expected)


def test_a_recipe_asks_for_it(tmp_path: Path) -> None:
    few = ["calibration.samples=8", "evaluation.tokens=1024", "tracking=none", f"paths.outputs={tmp_path}"]
    result = wrapq.run("w8a8_static", [*few, "float_prefix=1"])
    plan = Plan.model_validate_json((result.folder / "plan.json").read_text())
    assert any("the first token of each sequence" in note for note in plan.notes)
    model = load(result.folder)
    assert prefix_tokens(model) == 1
    without = wrapq.run("w8a8_static", few)
    assert prefix_tokens(load(without.folder)) == 0
    assert result.metrics["quantized"]["kl"] != without.metrics["quantized"]["kl"]
