"""Channel edges and residual streams in models of many families, without weights, against what their source says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import build_model
from wrapq.errors import ModelError
from wrapq.graph.dataflow import ChannelEdge, Graph, find_graph
from wrapq.wrappers.experts import take_apart

LAYER = "model.layers.0."
FUSED = {"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"}


def weightless(family: str, **changes: object) -> nn.Module:
    model = build_model(family, **changes).to("meta")
    model.tie_weights()  # type: ignore[operator]
    return model


def graph_of(family: str, **changes: object) -> Graph:
    return find_graph(weightless(family, **changes))


def consumers(edge: ChannelEdge) -> list[str]:
    return [consumer.module.rpartition(".")[2] for consumer in edge.consumers]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_a_decoder_layer(family: str) -> None:
    edges = graph_of(family).by_producer
    before_mlp = "pre_feedforward_layernorm" if "gemma" in family else "post_attention_layernorm"
    said = {
        "input_layernorm": (["q_proj", "k_proj", "v_proj"], set()),
        "self_attn.v_proj": (["o_proj"], {"attention"}),
        before_mlp: (["gate_proj", "up_proj"], set()),
        "mlp.up_proj": (["down_proj"], {"product"}),
    }
    assert {
        n.removeprefix(LAYER): (consumers(f), set(f.ops_between)) for n, f in edges.items() if n.startswith(LAYER)
    } == said
    assert consumers(edges["model.norm"]) == ["lm_head"]
    assert all(edge.fully_owned for edge in edges.values())


def test_heads_that_are_repeated_say_which_rows_their_columns_are() -> None:
    (consumer,) = graph_of("llama").by_producer[LAYER + "self_attn.v_proj"].consumers
    heads = torch.arange(32).reshape(2, 16)  # two heads of 16, each for two query heads
    assert torch.equal(consumer.columns, heads.repeat_interleave(2, 0).flatten())


def test_of_fused_projections_only_the_part_that_is_read_linearly_may_change() -> None:
    edges = graph_of("phi3").by_producer
    for name, start, end in ((FUSED["qkv"], 96, 128), (FUSED["gate_up"], 96, 192)):
        edge = edges[LAYER + name]
        assert edge.owned.nonzero().flatten().tolist() == list(range(start, end))
        assert edge.consumers[0].columns.unique().tolist() == list(range(start, end))


def test_a_relu_lets_positive_factors_through_and_a_gelu_none() -> None:
    assert graph_of("opt").by_producer["model.decoder.layers.0.fc1"].ops_between == {"positive"}
    edge = graph_of("gpt2").by_producer["transformer.h.0.mlp.c_fc"]
    assert edge.unowned


def test_norms_of_an_encoder_write_the_residual_stream() -> None:
    graph = graph_of("bert")
    assert graph.by_producer["bert.embeddings.LayerNorm"].other_consumers == ("a sum",)
    assert graph.by_producer["cls.predictions.transform.LayerNorm"].fully_owned
    assert "bert.embeddings.word_embeddings" in graph.tied["cls.predictions.decoder"]
    assert graph.heads == {f"bert.encoder.layer.{index}.attention.self": 16 for index in range(2)}


def test_experts_and_their_router_read_one_norm() -> None:
    edges = graph_of("mixtral").by_producer
    assert consumers(edges[LAYER + "post_attention_layernorm"]) == ["gate", "experts"]


def test_experts_that_are_modules_are_all_like_the_first() -> None:
    graph, fused = find_graph(take_apart(weightless("mixtral"))), graph_of("mixtral")
    experts = [f"{LAYER}mlp.experts.{index}" for index in range(4)]
    norm = graph.by_producer[LAYER + "post_attention_layernorm"]
    first = [f"{expert}.{name}_proj" for name in ("gate", "up") for expert in experts]
    assert [consumer.module for consumer in norm.consumers] == [f"{LAYER}mlp.gate", *first] and norm.fully_owned
    for expert in experts:
        edge = graph.by_producer[f"{expert}.up_proj"]
        assert [consumer.module for consumer in edge.consumers] == [f"{expert}.down_proj"]
        assert edge.fully_owned and edge.ops_between == {"product"}
    assert not any(f"{expert}.{name}_proj" in graph.by_producer for expert in experts for name in ("gate", "down"))
    (stream,), (same,) = graph.streams, fused.streams
    assert [name for name in stream.writers if LAYER in name][1:] == [f"{expert}.down_proj" for expert in experts]
    assert (stream.norms, stream.direct_consumers, stream.other_consumers) == (same.norms, (), ())


def test_what_reads_the_sum_of_all_experts_reads_none_alone() -> None:
    graph = find_graph(take_apart(weightless("nemotron_h", moe_latent_size=32)))
    last = "model.layers.1.mixer.experts.3.down_proj"
    assert consumers(graph.by_producer[last]) == ["fc2_latent_proj"]
    assert graph.by_producer[last].unowned and graph.by_producer[last].other_consumers == ("the sum of all experts",)
    latent = graph.by_producer["model.layers.1.mixer.fc1_latent_proj"]
    assert consumers(latent) == ["up_proj"] * 4 and latent.fully_owned


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "mixtral"])
def test_one_stream_that_all_norms_read(family: str) -> None:
    (stream,) = graph_of(family).streams
    assert len(stream.norms) == 5  # two of each of two layers, and the last
    assert (stream.direct_consumers, stream.other_consumers) == ((), ())


def test_gated_experts_shared_by_all_tokens_leave_the_stream_linear() -> None:
    (stream,) = graph_of("qwen2_moe").streams
    assert stream.other_consumers == ()


def test_the_real_model_shows_the_same_as_the_one_without_weights() -> None:
    model = build_model("phi3")
    real, meta = find_graph(model), find_graph(weightless("phi3"))
    assert [edge.name for edge in real.edges] == [edge.name for edge in meta.edges]
    assert all(torch.equal(a.owned, b.owned) for a, b in zip(real.edges, meta.edges, strict=True))
    assert real.streams == meta.streams


class Images(nn.Module):
    """Two convolutions and a linear layer over pooled and flattened channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(5 * 2 * 2, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.second(torch.relu(self.first(x)))))
        return self.head(x.flatten(1))


def test_convolutions_and_what_reads_their_channels_flattened() -> None:
    edges = find_graph(Images(), [torch.randn(2, 3, 8, 8)]).by_producer
    assert (consumers(edges["first"]), edges["first"].ops_between) == (["second"], {"positive"})
    assert torch.equal(edges["second"].consumers[0].columns, torch.arange(5).repeat_interleave(4))


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(y) if y.sum() > 0 else y


def test_a_forward_that_asks_for_values_cannot_be_followed_without_them() -> None:
    with pytest.raises(ModelError, match="depends on the value of an activation"):
        find_graph(Choosing().to("meta"), [torch.ones(2, 4)])
