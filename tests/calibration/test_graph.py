"""Who feeds whom, found in models of many families without their weights, against what their source says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import build_model
from wrapq.calibration.graph import Feed, Graph, find_graph
from wrapq.errors import ModelError
from wrapq.wrappers.experts import take_apart

LAYER = "model.layers.0."
FUSED = {"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"}


def weightless(family: str, **changes: object) -> nn.Module:
    model = build_model(family, **changes).to("meta")
    model.tie_weights()  # type: ignore[operator]
    return model


def graph_of(family: str, **changes: object) -> Graph:
    return find_graph(weightless(family, **changes))


def readers(feed: Feed) -> list[str]:
    return [reader.module.rpartition(".")[2] for reader in feed.readers]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_a_decoder_layer(family: str) -> None:
    feeds = graph_of(family).by_producer
    before_mlp = "pre_feedforward_layernorm" if "gemma" in family else "post_attention_layernorm"
    said = {
        "input_layernorm": (["q_proj", "k_proj", "v_proj"], set()),
        "self_attn.v_proj": (["o_proj"], {"attention"}),
        before_mlp: (["gate_proj", "up_proj"], set()),
        "mlp.up_proj": (["down_proj"], {"product"}),
    }
    assert {n.removeprefix(LAYER): (readers(f), set(f.path)) for n, f in feeds.items() if n.startswith(LAYER)} == said
    assert readers(feeds["model.norm"]) == ["lm_head"]
    assert all(feed.closed for feed in feeds.values())


def test_heads_that_are_repeated_say_which_rows_their_columns_are() -> None:
    (reader,) = graph_of("llama").by_producer[LAYER + "self_attn.v_proj"].readers
    heads = torch.arange(32).reshape(2, 16)  # two heads of 16, each for two query heads
    assert torch.equal(reader.columns, heads.repeat_interleave(2, 0).flatten())


def test_of_fused_projections_only_the_part_that_is_read_linearly_may_change() -> None:
    feeds = graph_of("phi3").by_producer
    for name, start, end in ((FUSED["qkv"], 96, 128), (FUSED["gate_up"], 96, 192)):
        feed = feeds[LAYER + name]
        assert feed.channels.nonzero().flatten().tolist() == list(range(start, end))
        assert feed.readers[0].columns.unique().tolist() == list(range(start, end))


def test_a_relu_lets_positive_factors_through_and_a_gelu_none() -> None:
    assert graph_of("opt").by_producer["model.decoder.layers.0.fc1"].path == {"positive"}
    feed = graph_of("gpt2").by_producer["transformer.h.0.mlp.c_fc"]
    assert feed.open


def test_norms_of_an_encoder_write_the_residual_stream() -> None:
    graph = graph_of("bert")
    assert graph.by_producer["bert.embeddings.LayerNorm"].seen_by == ("a sum",)
    assert graph.by_producer["cls.predictions.transform.LayerNorm"].closed
    assert "bert.embeddings.word_embeddings" in graph.tied["cls.predictions.decoder"]


def test_experts_and_their_router_read_one_norm() -> None:
    feeds = graph_of("mixtral").by_producer
    assert readers(feeds[LAYER + "post_attention_layernorm"]) == ["gate", "experts"]


def test_experts_that_are_modules_are_all_like_the_first() -> None:
    graph, fused = find_graph(take_apart(weightless("mixtral"))), graph_of("mixtral")
    experts = [f"{LAYER}mlp.experts.{index}" for index in range(4)]
    norm = graph.by_producer[LAYER + "post_attention_layernorm"]
    first = [f"{expert}.{name}_proj" for name in ("gate", "up") for expert in experts]
    assert [reader.module for reader in norm.readers] == [f"{LAYER}mlp.gate", *first] and norm.closed
    for expert in experts:
        feed = graph.by_producer[f"{expert}.up_proj"]
        assert [reader.module for reader in feed.readers] == [f"{expert}.down_proj"]
        assert feed.closed and feed.path == {"product"}
    assert not any(f"{expert}.{name}_proj" in graph.by_producer for expert in experts for name in ("gate", "down"))
    (stream,), (same,) = graph.streams, fused.streams
    assert [name for name in stream.writers if LAYER in name][1:] == [f"{expert}.down_proj" for expert in experts]
    assert (stream.norms, stream.readers, stream.seen_by) == (same.norms, (), ())


def test_what_reads_the_sum_of_all_experts_reads_none_alone() -> None:
    graph = find_graph(take_apart(weightless("nemotron_h", moe_latent_size=32)))
    last = "model.layers.1.mixer.experts.3.down_proj"
    assert readers(graph.by_producer[last]) == ["fc2_latent_proj"]
    assert graph.by_producer[last].open and graph.by_producer[last].seen_by == ("the sum of all experts",)
    latent = graph.by_producer["model.layers.1.mixer.fc1_latent_proj"]
    assert readers(latent) == ["up_proj"] * 4 and latent.closed


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "mixtral"])
def test_one_stream_that_all_norms_read(family: str) -> None:
    (stream,) = graph_of(family).streams
    assert len(stream.norms) == 5  # two of each of two layers, and the last
    assert (stream.readers, stream.seen_by) == ((), ())


def test_gated_experts_shared_by_all_tokens_leave_the_stream_linear() -> None:
    (stream,) = graph_of("qwen2_moe").streams
    assert stream.seen_by == ()


def test_the_real_model_shows_the_same_as_the_one_without_weights() -> None:
    model = build_model("phi3")
    real, meta = find_graph(model), find_graph(weightless("phi3"))
    assert [feed.name for feed in real.feeds] == [feed.name for feed in meta.feeds]
    assert all(torch.equal(a.channels, b.channels) for a, b in zip(real.feeds, meta.feeds, strict=True))
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
    feeds = find_graph(Images(), [torch.randn(2, 3, 8, 8)]).by_producer
    assert (readers(feeds["first"]), feeds["first"].path) == (["second"], {"positive"})
    assert torch.equal(feeds["second"].readers[0].columns, torch.arange(5).repeat_interleave(4))


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
