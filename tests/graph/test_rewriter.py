"""Rewrites that keep a model's function: it is kept, all can be undone to the bit, and what cannot work is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import build_model
from tests.graph.test_dataflow import Images
from wrapq.errors import ModelError
from wrapq.graph.dataflow import Graph, find_graph
from wrapq.graph.norms import norm_offset
from wrapq.graph.rewriter import GraphRewriter
from wrapq.statistics.transport import Rotated, Scaled, Shifted, transform_hessian, transform_magnitude
from wrapq.wrappers.experts import take_apart

EVERY = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "opt", "bert", "mixtral", "qwen2_moe")


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def scale_all(rewriter: GraphRewriter, graph: Graph) -> int:
    edges = [edge for edge in graph.edges if not edge.unowned]
    for edge in edges:
        for name in (edge.producer, *(consumer.module for consumer in edge.consumers)):
            rewriter.untie(name)
        rewriter.scale(edge, torch.where(edge.owned, torch.rand(edge.width) + 0.5, 1.0))
    return len(edges)


def test_a_bias_cannot_move_into_experts_that_have_none() -> None:
    model = take_apart(build_model("mixtral"))
    norm = "model.layers.0.post_attention_layernorm"
    rewriter = GraphRewriter(model, find_graph(model))
    model.get_submodule(norm).bias = nn.Parameter(torch.ones(64))
    edge = rewriter.graph.by_producer[norm]
    experts = replace(edge, consumers=tuple(consumer for consumer in edge.consumers if ".experts." in consumer.module))
    with pytest.raises(ModelError, match=r"experts\.0\.gate_proj \(Linear\) cannot take the bias"):
        rewriter.fold(experts)


@pytest.mark.parametrize("family", EVERY)
def test_scaling_every_feed_keeps_the_function_and_can_be_undone(family: str, token_batches: list[Tensor]) -> None:
    model = build_model(family)
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, model(token_batches[0]).logits
    graph = find_graph(model)
    rewriter = GraphRewriter(model, graph)
    assert scale_all(rewriter, graph) >= 4
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) > 10
    assert relative(model(token_batches[0]).logits, expected) < 1e-5
    rewriter.undo_log.restore()
    assert set(model.state_dict()) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.tie_word_embeddings == build_model(family).config.tie_word_embeddings
    tied = [name for name, _ in model.named_parameters()]
    assert tied == [name for name, _ in build_model(family).named_parameters()]


def test_scaling_through_convolutions() -> None:
    model, x = Images(), torch.randn(2, 3, 8, 8)
    model.requires_grad_(False)
    expected, graph = model(x), find_graph(model, [x])
    assert scale_all(GraphRewriter(model, graph), graph) == 2
    assert relative(model(x), expected) < 1e-5


def test_statistics_go_along_with_the_edits(token_batches: list[Tensor]) -> None:
    model = build_model("llama")
    graph = find_graph(model)
    name = "model.layers.1.self_attn.o_proj"
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    model(token_batches[0])
    rewriter = GraphRewriter(model, graph)
    scale_all(rewriter, graph)
    model(token_batches[0])
    before, after = seen
    edits = rewriter.input_changes[name]
    torch.testing.assert_close(transform_hessian(before.t() @ before, edits), after.t() @ after, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(transform_magnitude(before.abs().amax(0), edits), after.abs().amax(0))


def test_rotations_carry_hessians_only_and_a_shift_carries_nothing() -> None:
    x = torch.randn(20, 6, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    s = torch.rand(6, dtype=torch.float64) + 0.5
    y = (x / s) @ q
    torch.testing.assert_close(
        transform_hessian(x.t() @ x, [Scaled(s), Rotated(q, torch.arange(len(q))[None])]), y.t() @ y
    )
    assert transform_magnitude(x.abs().amax(0), [Scaled(s), Rotated(q, torch.arange(len(q))[None])]) is None
    assert transform_hessian(x.t() @ x, [Shifted()]) is None


@pytest.mark.parametrize(
    ("factors", "what"),
    [(torch.zeros(96), "zero or not finite"), (-torch.ones(96), "negative factor"), (torch.ones(5), "for 96 channels")],
)
def test_factors_that_cannot_work_are_refused(factors: Tensor, what: str) -> None:
    model = build_model("opt")
    graph = find_graph(model)
    with pytest.raises(ModelError, match=what):
        GraphRewriter(model, graph).scale(graph.by_producer["model.decoder.layers.0.fc1"], factors)


def test_a_tied_weight_is_not_changed_behind_the_back_of_the_other() -> None:
    model = build_model("gpt2")
    graph = find_graph(model)
    with pytest.raises(ModelError, match=r"lm_head.weight is tied to transformer.wte"):
        GraphRewriter(model, graph).fold(graph.by_producer["transformer.ln_f"])


def test_the_convention_of_a_norm_is_found_by_running_it() -> None:
    assert norm_offset(build_model("llama").model.norm, "norm") == 0
    assert norm_offset(build_model("gemma3").model.norm, "norm") == 1
    assert norm_offset(nn.LayerNorm(8), "norm") == 0


def test_a_norm_folds_although_one_of_its_channels_has_no_gain() -> None:
    model, x = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)), torch.randn(4, 6)
    model[0].weight.data[2], model[0].bias.data[:] = 0, torch.arange(6.0)
    expected, graph = model(x), find_graph(model, [x])
    GraphRewriter(model, graph).fold(graph.by_producer["0"])
    assert bool((model[0].weight == 1).all()) and not bool(model[0].bias.any())
    assert relative(model(x), expected) < 1e-5


@pytest.mark.parametrize("family", ["gemma3", "llama"])
@torch.no_grad()
def test_a_norm_of_16_bits_divides_by_what_it_can_hold(family: str, token_batches: list[Tensor]) -> None:
    model = build_model(family).to(torch.bfloat16)
    wide = build_model(family)
    wide.load_state_dict(model.state_dict())
    before = wide(token_batches[0]).logits
    rewriter = GraphRewriter(model, find_graph(model))
    for edge in rewriter.graph.edges:
        if edge.layer.kind != "norm" or edge.unowned or rewriter.graph.tied_reason(edge.modules):
            continue
        rewriter.scale(edge, torch.where(edge.owned, torch.logspace(-1, 2.5, edge.width), 1.0))
    wide.load_state_dict(model.state_dict())
    after = wide(token_batches[0]).logits
    assert float((after - before).norm() / before.norm()) < 0.02, "what the columns are rounded by, and no more"
