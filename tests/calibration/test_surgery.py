"""Edits that keep a model's function: it is kept, all can be undone to the bit, and what cannot work is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.calibration.test_graph import Images
from tests.conftest import build_model
from wrapq.calibration.graph import Graph, find_graph
from wrapq.calibration.norms import norm_offset
from wrapq.calibration.surgery import Surgeon
from wrapq.calibration.transport import Rotated, Scaled, Shifted, carry_hessian, carry_magnitude
from wrapq.errors import ModelError
from wrapq.wrappers.experts import take_apart

EVERY = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "opt", "bert", "mixtral", "qwen2_moe")


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def scale_all(surgeon: Surgeon, graph: Graph) -> int:
    feeds = [feed for feed in graph.feeds if not feed.open]
    for feed in feeds:
        for name in (feed.producer, *(reader.module for reader in feed.readers)):
            surgeon.untie(name)
        surgeon.scale(feed, torch.where(feed.channels, torch.rand(len(feed.channels)) + 0.5, 1.0))
    return len(feeds)


def test_a_bias_cannot_move_into_experts_that_have_none() -> None:
    model = take_apart(build_model("mixtral"))
    norm = "model.layers.0.post_attention_layernorm"
    surgeon = Surgeon(model, find_graph(model))
    model.get_submodule(norm).bias = nn.Parameter(torch.ones(64))
    feed = surgeon.graph.by_producer[norm]
    experts = replace(feed, readers=tuple(reader for reader in feed.readers if ".experts." in reader.module))
    with pytest.raises(ModelError, match=r"experts\.0\.gate_proj \(Linear\) cannot take the bias"):
        surgeon.fold(experts)


@pytest.mark.parametrize("family", EVERY)
def test_scaling_every_feed_keeps_the_function_and_can_be_undone(family: str, token_batches: list[Tensor]) -> None:
    model = build_model(family)
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, model(token_batches[0]).logits
    graph = find_graph(model)
    surgeon = Surgeon(model, graph)
    assert scale_all(surgeon, graph) >= 4
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) > 10
    assert relative(model(token_batches[0]).logits, expected) < 1e-5
    surgeon.restore()
    assert set(model.state_dict()) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.tie_word_embeddings == build_model(family).config.tie_word_embeddings
    tied = [name for name, _ in model.named_parameters()]
    assert tied == [name for name, _ in build_model(family).named_parameters()]


def test_scaling_through_convolutions() -> None:
    model, x = Images(), torch.randn(2, 3, 8, 8)
    model.requires_grad_(False)
    expected, graph = model(x), find_graph(model, [x])
    assert scale_all(Surgeon(model, graph), graph) == 2
    assert relative(model(x), expected) < 1e-5


def test_statistics_go_along_with_the_edits(token_batches: list[Tensor]) -> None:
    model = build_model("llama")
    graph = find_graph(model)
    name = "model.layers.1.self_attn.o_proj"
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    model(token_batches[0])
    surgeon = Surgeon(model, graph)
    scale_all(surgeon, graph)
    model(token_batches[0])
    before, after = seen
    edits = surgeon.transports[name]
    torch.testing.assert_close(carry_hessian(before.t() @ before, edits), after.t() @ after, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(carry_magnitude(before.abs().amax(0), edits), after.abs().amax(0))


def test_rotations_carry_hessians_only_and_a_shift_carries_nothing() -> None:
    x = torch.randn(20, 6, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    s = torch.rand(6, dtype=torch.float64) + 0.5
    y = (x / s) @ q
    torch.testing.assert_close(carry_hessian(x.t() @ x, [Scaled(s), Rotated(q, torch.arange(len(q))[None])]), y.t() @ y)
    assert carry_magnitude(x.abs().amax(0), [Scaled(s), Rotated(q, torch.arange(len(q))[None])]) is None
    assert carry_hessian(x.t() @ x, [Shifted()]) is None


@pytest.mark.parametrize(
    ("factors", "what"),
    [(torch.zeros(96), "zero or not finite"), (-torch.ones(96), "negative factor"), (torch.ones(5), "for 96 channels")],
)
def test_factors_that_cannot_work_are_refused(factors: Tensor, what: str) -> None:
    model = build_model("opt")
    graph = find_graph(model)
    with pytest.raises(ModelError, match=what):
        Surgeon(model, graph).scale(graph.by_producer["model.decoder.layers.0.fc1"], factors)


def test_a_tied_weight_is_not_changed_behind_the_back_of_the_other() -> None:
    model = build_model("gpt2")
    graph = find_graph(model)
    with pytest.raises(ModelError, match=r"lm_head.weight is tied to transformer.wte"):
        Surgeon(model, graph).fold(graph.by_producer["transformer.ln_f"])


def test_the_convention_of_a_norm_is_found_by_running_it() -> None:
    assert norm_offset(build_model("llama").model.norm, "norm") == 0
    assert norm_offset(build_model("gemma3").model.norm, "norm") == 1
    assert norm_offset(nn.LayerNorm(8), "norm") == 0
