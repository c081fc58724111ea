"""The blocks of Llama-like families: the gated MLP and the decoder layer, against the contract."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.conftest import build_model
from tests.contracts.wrapper import WrapperContract
from wrapq import PTQConfig, convert, prepare
from wrapq.wrappers.decoder import DecoderLayer, GatedMLP
from wrapq.wrappers.model import iter_quantizers


class TestGatedMLP(WrapperContract):
    wrapper, points = GatedMLP, ("input", "mul", "output")
    tolerance = 5e-3

    @classmethod
    def config(cls, weight: str = "int8:channel:sym", activations: str = "uint8:tensor:asym") -> PTQConfig:
        return PTQConfig(weight=weight, activations=activations)

    def module(self) -> nn.Module:
        torch.manual_seed(3)
        config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)
        return LlamaMLP(config).requires_grad_(False)


def test_a_decoder_layer_by_itself():
    """It runs with the arguments its family passes, in a loop of the user's own."""
    model = build_model("llama")
    layer, rotary = model.model.layers[0], model.model.rotary_emb
    hidden = torch.randn(2, 7, 64)
    arguments = {"position_embeddings": rotary(hidden, torch.arange(7)[None]), "attention_mask": causal(7)}
    expected = layer(hidden, **arguments)
    prepared = prepare(layer, PTQConfig(weight="int16:channel:sym", activations="int16:tensor:asym"))
    assert prepared.wrapper is DecoderLayer
    points = [quantizer.where.rpartition(".")[2] for quantizer in iter_quantizers(prepared)]
    assert {"attention_add", "mlp_add", "mul", "probs"} <= set(points)
    torch.testing.assert_close(prepared(hidden, **arguments), expected, rtol=1e-5, atol=1e-5)
    converted = convert(prepared)
    torch.testing.assert_close(converted(hidden, **arguments), expected, rtol=1e-2, atol=1e-2)


def causal(tokens: int) -> Tensor:
    return torch.full((1, 1, tokens, tokens), torch.finfo(torch.float32).min).triu(1)
