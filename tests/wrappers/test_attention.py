"""The attention function by itself, against the library's eager one."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_eager
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_eager

from tests.conftest import build_model
from wrapq import PTQConfig, padding, prepare
from wrapq.errors import ModelError
from wrapq.wrappers.attention import IMPLEMENTATION, attention_forward
from wrapq.wrappers.model import iter_quantizers, iter_wrapped

MIN = torch.finfo(torch.float32).min


@pytest.fixture
def attention() -> nn.Module:
    return prepare(build_model("llama"), PTQConfig(activations="int8:tensor:asym")).model.layers[0].self_attn


def states(queries: int = 5, keys: int = 5) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 4, queries, 16), torch.randn(2, 2, keys, 16), torch.randn(2, 2, keys, 16)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 9), (1, 1)], ids=["prompt", "one more token", "first token"])
@pytest.mark.parametrize("masked", [False, True])
def test_is_the_eager_function_to_the_bit(attention: nn.Module, queries: int, keys: int, masked: bool):
    tensors = states(queries, keys)
    mask = torch.full((2, 1, queries, keys), MIN).triu(1 + keys - queries) if masked else None
    got = attention_forward(attention, *tensors, mask, scaling=0.3)
    for one, other in zip(got, llama_eager(attention, *tensors, mask, scaling=0.3), strict=True):
        assert torch.equal(one, other)


def test_the_scale_follows_the_head_where_none_is_given(attention: nn.Module):
    tensors = states()
    assert torch.equal(attention_forward(attention, *tensors, None)[0], llama_eager(attention, *tensors, None, 0.25)[0])


@pytest.mark.parametrize("wrapped", [True, False])
def test_soft_capping(attention: nn.Module, wrapped: bool):
    module = attention if wrapped else attention.original
    tensors = states()
    expected, _ = gemma2_eager(module, *tensors, None, scaling=3.0, softcap=2.0)
    got, _ = attention_forward(module, *tensors, None, scaling=3.0, softcap=2.0)
    torch.testing.assert_close(got, expected)


def test_sinks_are_refused_not_dropped(attention: nn.Module):
    with pytest.raises(ModelError, match="attention sinks"):
        attention_forward(attention, *states(), None, s_aux=torch.zeros(4))


@pytest.mark.parametrize("padded", [False, True])
def test_masked_scores_enter_no_statistic(attention: nn.Module, padded: bool):
    seen, observer = [], attention.quantizers["scores"].observer
    observer.update = seen.append
    query, key, value = states()
    mask, real = torch.full((2, 1, 5, 5), MIN).triu(1), torch.ones(2, 5, dtype=torch.bool)
    real[1, 3:] = not padded
    with padding(real):
        attention_forward(attention, query, key, value, mask, scaling=1.0)
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ keys.transpose(-1, -2)
    keep = (torch.ones(5, 5).tril() > 0) & real[..., None]
    assert torch.equal(seen[0].flatten(1), torch.stack([head[keep] for head in scores.transpose(0, 1)]))


def test_layers_may_be_left_out():
    """Those run the library's fused attention, as before; their masks are the eager ones."""
    ids = torch.randint(3, 96, (2, 9))
    model = build_model("llama")
    expected = model(input_ids=ids).logits
    prepared = prepare(model, PTQConfig(activations="int8:tensor:asym", overrides={"model.layers.0.*": None}))
    wrapped = [name for name, _ in iter_wrapped(prepared) if name.endswith("self_attn")]
    assert wrapped == ["model.layers.1.self_attn"]
    assert prepared.config._attn_implementation == IMPLEMENTATION
    torch.testing.assert_close(prepared(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    prepared(input_ids=ids)
    assert all(not q.observer.empty for q in iter_quantizers(prepared) if q.observer is not None)


def test_a_model_without_attention_points_keeps_its_attention():
    prepared = prepare(build_model("llama"), PTQConfig(activation=None))
    assert prepared.config._attn_implementation != IMPLEMENTATION
