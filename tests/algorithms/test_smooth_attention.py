"""Smoothed keys: the function stays, the factors are those of the formula, and the scores lose less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import build_model
from tests.resolve.conftest import MakePlan, make_plan, refusal  # noqa: F401
from wrapq import PTQConfig, calibrate, convert, load, prepare
from wrapq.algorithms.smooth_attention import SmoothAttention
from wrapq.calibration.processes import Processes
from wrapq.engine.apply_transforms import apply_transform
from wrapq.graph.blocks import Batch
from wrapq.graph.dataflow import find_graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.quant.affine import dynamic_fake_quantize
from wrapq.quant.spec import QuantSpec
from wrapq.runs.checkpoint import save_model
from wrapq.runs.folder import RunFolder
from wrapq.runtime.smoothing import SMOOTHING, KeySmoothing
from wrapq.wrappers.attention import watched
from wrapq.wrappers.model import iter_quantizers

NAME = "model.layers.1.self_attn"
SPEC = QuantSpec.parse("int4:token:asym:dyn")
LINEAR = "l: {match: {type: Linear}, weight: int8:channel}\nhead: {match: {name: lm_head}, quantize: false}"
TAIL = "round: {algorithm: rtn}"


def with_shared_keys(family: str) -> nn.Module:
    """A model whose keys have a large part in common, and channels of different size."""
    model = build_model(family)
    projection = model.get_submodule(f"{NAME}.k_proj")
    with torch.no_grad():
        rows = projection.weight.shape[0]
        projection.weight.mul_(torch.linspace(0.2, 4, rows)[:, None])
        projection.bias = nn.Parameter(torch.linspace(-6, 6, rows))
    return model


def smoothed(model: nn.Module, batches: list[Batch]) -> GraphRewriter:
    rewriter = GraphRewriter(model, find_graph(model), {NAME: {"key": SPEC}})
    algorithm = SmoothAttention()
    targets = algorithm.find_targets(rewriter.graph, rewriter.specs)
    assert targets.names == (NAME,)
    apply_transform(rewriter, algorithm, targets.names, batches, Processes())
    return rewriter


def scores_seen(model: nn.Module, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Queries [H, M, D] and keys [H_kv, M, D] of real tokens, after position encoding, in float64."""
    seen: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        with watched(model.get_submodule(NAME), lambda query, key: seen.append((query, key))):
            model(**batch.inputs)
    real = [torch.ones_like(b.inputs["input_ids"]).bool() if b.mask is None else b.mask.bool() for b in batches]
    return tuple(  # type: ignore[return-value]
        torch.cat([pair[i].double().transpose(0, 1)[:, mask] for pair, mask in zip(seen, real, strict=True)], 1)
        for i in (0, 1)
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@torch.no_grad()
def test_factors_are_those_of_the_formula(family: str, token_batches: list[Tensor]) -> None:
    mask = torch.ones_like(token_batches[1])
    mask[:, :3] = 0
    batches = [
        Batch({"input_ids": token_batches[0]}),
        Batch({"input_ids": token_batches[1], "attention_mask": mask}, mask.bool()),
    ]
    model = with_shared_keys(family)
    query, key = scores_seen(model, batches)
    smoothing = smoothed(model, batches).model.get_submodule(f"{NAME}.{SMOOTHING}")
    assert isinstance(smoothing, KeySmoothing)
    torch.testing.assert_close(smoothing.mean.double(), key.mean(1), rtol=1e-4, atol=1e-4)
    shared = query.unflatten(0, (len(key), -1))  # the queries of each head of the keys
    expected = (key.var(1, correction=0) / shared.square().mean((1, 2))) ** 0.25
    torch.testing.assert_close(smoothing.factors.double(), expected, rtol=1e-2, atol=1e-4)


@torch.no_grad()
def test_scores_lose_less(token_batches: list[Tensor]) -> None:
    batches = [Batch({"input_ids": ids}) for ids in token_batches]
    model = with_shared_keys("llama")
    query, key = (part.float() for part in scores_seen(model, batches))
    smoothing = smoothed(model, batches).model.get_submodule(f"{NAME}.{SMOOTHING}")

    def lost(query: Tensor, key: Tensor) -> float:
        rounded = dynamic_fake_quantize(key, SPEC).repeat_interleave(len(query) // len(key), 0)
        exact = key.repeat_interleave(len(query) // len(key), 0)
        return float((query @ (rounded - exact).mT).square().sum())

    (turned,), (kept,) = smoothing(query[None], key[None])
    assert lost(turned, kept) < 0.5 * lost(query, key)
    exact, moved = (q @ k.repeat_interleave(len(q) // len(k), 0).mT for q, k in ((query, key), (turned, kept)))
    torch.testing.assert_close(moved.softmax(-1), exact.softmax(-1), rtol=1e-3, atol=1e-5)


def quantized(token_batches: list[Tensor]) -> nn.Module:
    overrides = {"*self_attn": {"key": str(SPEC), "value": str(SPEC)}}
    model = prepare(with_shared_keys("llama"), PTQConfig(weight=None, activations="float", overrides=overrides))
    stack = {"keys": "smooth_attention", "turn": {"algorithm": "rotate", "rotations": ["R3"]}}
    calibrate(model, token_batches, stack=stack)
    return model


@torch.no_grad()
def test_the_function_stays_beside_a_rotation(token_batches: list[Tensor]) -> None:
    model = quantized(token_batches)
    for point in iter_quantizers(model):
        point.enabled = False
    expected = with_shared_keys("llama")(token_batches[0]).logits
    torch.testing.assert_close(model(token_batches[0]).logits, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_it_is_saved_loaded_and_generates(token_batches: list[Tensor], tmp_path: Path) -> None:
    model = convert(quantized(token_batches))
    outputs = model(token_batches[0]).logits
    text = model.generate(token_batches[1], max_new_tokens=6, do_sample=False)
    save_model(model, RunFolder(tmp_path))
    loaded = load(tmp_path)
    assert torch.equal(loaded(token_batches[0]).logits, outputs)
    assert torch.equal(loaded.generate(token_batches[1], max_new_tokens=6, do_sample=False), text)


def test_the_plan(make_plan: MakePlan, refusal: object) -> None:  # noqa: F811
    stack = "keys: {algorithm: smooth_attention}"
    cache = "cache: {match: {type: Attention}, points: {key: 'int4:token:asym:dyn'}}"
    plan = make_plan(f"{LINEAR}\n{cache}", f"{stack}\nturn: {{algorithm: rotate, rotations: [R3]}}\n{TAIL}")
    assert plan.stages[0].online[0] == "model.layers.0.self_attn"
    nothing = "smooth_attention has nothing to do: no keys are quantized"
    assert nothing in refusal(LINEAR, f"{stack}\n{TAIL}")  # type: ignore[operator]
    again = f"{stack}\nagain: {{algorithm: smooth_attention}}\n{TAIL}"
    assert "again would change the input of" in refusal(f"{LINEAR}\n{cache}", again)  # type: ignore[operator]
