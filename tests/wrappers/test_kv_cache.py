"""Quantized keys and values while text is generated with a cache: the same numbers as in one pass over the text."""

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import build_model
from wrapq import PTQConfig, convert, padding, prepare
from wrapq.errors import PlanError, SpecError
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.model import iter_quantizers, wrap_model

FIXED = [
    "int8:tensor:sym",
    "int8:tensor:asym:percentile",
    "fp8_e4m3:tensor:sym",
    "int8:head:sym",
    "fp8_e4m3:head",
    "int4:g8",
]
DYNAMIC = ["int8:token:sym:dyn", "int4:token:asym:dyn", "fp4_e2m1:g16:scale=e8m0:dyn"]
"""Dynamic specs whose scales do not reach across tokens."""
FAMILIES = {"llama": "*.self_attn", "gpt2": "*.attn"}
PROMPT, NEW = 6, 5


def prepared(family: str, text: str) -> nn.Module:
    overrides = {FAMILIES[family]: {"key": text, "value": text}}
    return prepare(build_model(family), PTQConfig(weight=None, activations="float", overrides=overrides))


def ids(model: nn.Module, tokens: int = PROMPT, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(1, model.config.vocab_size, (rows, tokens), generator=generator)


def quantized(family: str, text: str) -> nn.Module:
    model = prepared(family, text)
    with torch.no_grad():
        model(ids(model, 16))
    return convert(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", FIXED + DYNAMIC)
@torch.no_grad()
def test_generation_with_a_cache_has_the_logits_of_one_pass(family: str, text: str):
    model = quantized(family, text)
    out = model.generate(
        ids(model),
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole = model(out.sequences, use_cache=False).logits
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, whole[:, PROMPT - 1 + step], rtol=1e-4, atol=1e-4)
    unquantized = build_model(family)(out.sequences).logits
    assert float((whole - unquantized).abs().max()) > 1e-5  # the points do something


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["int8:head:sym", "int8:tensor:sym", "int4:token:asym:dyn"])
@torch.no_grad()
def test_fake_quantized_and_converted_generate_the_same(family: str, text: str):
    model = prepared(family, text)
    model(ids(model, 16))
    for quantizer in iter_quantizers(model):
        quantizer.freeze()
    arguments = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids(model), **arguments)
    assert torch.equal(convert(model).generate(ids(model), **arguments), expected)


@torch.no_grad()
def test_heads_keep_their_ranges_apart_with_padding():
    model = prepared("llama", "int8:head:sym")
    tokens = ids(model, 8)
    mask = torch.ones_like(tokens).bool()
    mask[1, 5:] = False
    with padding(mask):
        model(tokens, attention_mask=mask.long())
    padded = [q.observer.range() for q in iter_quantizers(model)]
    other = prepared("llama", "int8:head:sym")
    other(tokens[:1])
    other(tokens[1:, :5])
    for (low, high), quantizer in zip(padded, iter_quantizers(other), strict=True):
        expected = quantizer.observer.range()
        assert low.shape == (model.config.num_key_value_heads, 1, 1)
        torch.testing.assert_close((low, high), expected)


@torch.no_grad()
def test_heads_are_refused_where_tokens_come_first():
    """By `prepare`, and by the point itself in a model that was wrapped without it."""
    with pytest.raises(PlanError, match="one scale for each attention head, and of LlamaAttention only query, key"):
        prepare(build_model("llama"), PTQConfig(None, "float", {"*.self_attn": {"context": "int8:head:sym"}}))
    model = wrap_model(
        build_model("llama"), {"model.layers.0.self_attn": {"context": QuantSpec.parse("int8:head:sym")}}
    )
    with pytest.raises(SpecError, match=r"self_attn\.context: int8:head:sym is for query, key"):
        model(ids(model))
