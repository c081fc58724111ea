"""Whole models of many families, randomly initialized: every point there, every step of the lifecycle to the bit."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import FAMILIES, KINDS, LAYERS, LLAMA_LIKE, build_model
from tests.contracts.wrapper import round_weights
from wrapq import PTQConfig, convert, load, padding, prepare, restore
from wrapq.runs.checkpoint import save_model
from wrapq.runs.folder import RunFolder
from wrapq.runtime.module import QuantizedModule
from wrapq.wrappers.model import iter_quantizers, iter_wrapped
from wrapq.wrappers.quantizer import State, WeightQuantizer

INT8 = PTQConfig(weight="int8:channel:sym", activations="uint8:tensor:asym")
INT16 = PTQConfig(weight="int16:channel:sym", activations="int16:tensor:asym")
LEAF = {"weight", "input", "output"}
ATTENTION = {"query", "key", "value", "scores", "probs", "context"}
LAYER = {
    "": {"input", "attention_add", "mlp_add"},
    ".input_layernorm": LEAF,
    ".self_attn": ATTENTION,
    ".self_attn.q_proj": LEAF,
    ".self_attn.k_proj": LEAF,
    ".self_attn.v_proj": LEAF,
    ".self_attn.o_proj": LEAF,
    ".post_attention_layernorm": LEAF,
    ".mlp": {"input", "mul", "output"},
    ".mlp.gate_proj": LEAF,
    ".mlp.up_proj": LEAF,
    ".mlp.act_fn": {"input", "output"},
    ".mlp.down_proj": LEAF,
}
QWEN3_NORMS = {".self_attn.q_norm": LEAF, ".self_attn.k_norm": LEAF}


def calibrated(family: str, batches: list[Tensor], config: PTQConfig = INT8, **changes: object) -> nn.Module:
    prepared = prepare(build_model(family, **changes), config)
    for batch in batches:
        prepared(input_ids=batch)
    return prepared


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_every_expected_point_is_there_and_gets_quantized(family: str, token_batches: list[Tensor]):
    layer = LAYER | (QWEN3_NORMS if family == "qwen3" else {})
    expected = {f"model.layers.{i}{name}": points for i in range(LAYERS) for name, points in layer.items()}
    expected |= {"model.embed_tokens": {"weight", "output"}, "model.norm": LEAF, "lm_head": LEAF}
    prepared = calibrated(family, token_batches)
    assert {name: set(module.quantizers) for name, module in iter_wrapped(prepared)} == expected
    converted = convert(prepared)
    quantized = {n: set(m.specs) for n, m in converted.named_modules() if isinstance(m, QuantizedModule)}
    assert quantized == expected
    names = set(converted.state_dict())
    assert not [name for name in names if name.endswith(".weight")]
    for name, points in expected.items():
        assert {f"{name}.{point}_scale" for point in points} <= names


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_is_eager_attention_to_the_bit(family: str, token_batches: list[Tensor]):
    eager, model = build_model(family), build_model(family)
    eager.set_attn_implementation("eager")
    fused = logits(model, token_batches[0])
    prepared = prepare(model, INT8)
    mask = torch.ones_like(token_batches[1])
    mask[0, 5:] = 0
    for ids, attention_mask in ((token_batches[0], None), (token_batches[1], mask)):
        expected = eager(input_ids=ids, attention_mask=attention_mask).logits
        assert torch.equal(prepared(input_ids=ids, attention_mask=attention_mask).logits, expected)
    if family != "gemma2":  # whose own fused attention leaves its cap out
        torch.testing.assert_close(logits(prepared, token_batches[0]), fused, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_without_the_attention_observing_changes_no_bit(family: str, token_batches: list[Tensor]):
    model = build_model(family)
    expected = logits(model, token_batches[0])
    prepared = prepare(model, PTQConfig(activations="int8:tensor:asym", overrides={"*.self_attn": None}))
    assert torch.equal(logits(prepared, token_batches[0]), expected)


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_disabled_points_are_the_float_model(family: str, token_batches: list[Tensor]):
    prepared = calibrated(family, token_batches)
    expected = logits(prepared, token_batches[0])
    round_weights(prepared)
    assert not torch.equal(logits(prepared, token_batches[0]), expected)
    for quantizer in iter_quantizers(prepared):
        assert quantizer.state is State.QUANTIZED
        quantizer.enabled = False
    assert torch.equal(logits(prepared, token_batches[0]), expected)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("config", [INT8, PTQConfig(activations="int8:token:dyn")], ids=["static", "dynamic"])
def test_fake_quantized_converted_and_loaded_have_the_same_bits(
    family: str, config: PTQConfig, token_batches: list[Tensor], tmp_path: Path
):
    prepared = calibrated(family, token_batches, config)
    fake = copy.deepcopy(prepared)
    round_weights(fake)
    converted = convert(prepared)
    for ids in (token_batches[1], token_batches[0][:1], token_batches[0][:1, :1]):
        assert torch.equal(logits(converted, ids), logits(fake, ids))
    assert torch.equal(logits(copy.deepcopy(converted), token_batches[0]), logits(converted, token_batches[0]))
    if family == "bert":
        return  # checkpoints are of causal language models
    save_model(converted, RunFolder(tmp_path))
    assert torch.equal(logits(load(tmp_path), token_batches[1]), logits(converted, token_batches[1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_close_to_float_at_16_bit(family: str, token_batches: list[Tensor]):
    model = build_model(family)
    model.set_attn_implementation("eager")
    expected = logits(model, token_batches[0])
    converted = convert(calibrated(family, token_batches, INT16))
    assert relative(logits(converted, token_batches[0]), expected) < 2e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_undo_gives_the_very_objects_back(family: str, token_batches: list[Tensor]):
    model = build_model(family)
    modules, expected = dict(model.named_modules()), logits(model, token_batches[0])
    attention, state = model.config._attn_implementation, dict(model.state_dict())
    prepared = prepare(model, INT8)
    assert prepared is model
    prepared(input_ids=token_batches[1])
    restored = restore(prepared)
    assert list(modules) == [name for name, _ in restored.named_modules()]
    assert all(module is modules[name] for name, module in restored.named_modules())
    assert restored.config._attn_implementation == attention
    assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in restored.state_dict().items())
    assert torch.equal(logits(restored, token_batches[0]), expected)


@pytest.mark.parametrize("family", KINDS[:-1])  # BERT generates nothing
def test_generation_with_a_cache(family: str, token_batches: list[Tensor]):
    prepared = calibrated(family, token_batches)
    fake = copy.deepcopy(prepared)
    round_weights(fake)
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = fake.generate(token_batches[1], **arguments)
    assert expected.shape == (2, token_batches[1].shape[1] + 8)
    assert torch.equal(convert(prepared).generate(token_batches[1], **arguments), expected)


@pytest.mark.parametrize("family", LLAMA_LIKE)
@pytest.mark.parametrize("before", [False, True], ids=["asked first after", "asked before"])
def test_hidden_states_and_attentions_still_come_out(family: str, before: bool, token_batches: list[Tensor]):
    arguments = {"input_ids": token_batches[0], "output_hidden_states": True, "output_attentions": True}
    model = build_model(family)
    if before:
        model.set_attn_implementation("eager")
        model(**arguments)
    prepared = prepare(model, INT8)
    for stage in (prepared, convert(prepared)) if prepared(**arguments) else ():
        out = stage(**arguments)
        assert len(out.hidden_states) == LAYERS + 1 and len(out.attentions) == LAYERS
        assert all(isinstance(hidden, Tensor) and hidden.shape == (2, 12, 64) for hidden in out.hidden_states)
        assert all(probs.shape == (2, 4, 12, 12) for probs in out.attentions)


@pytest.mark.parametrize("family", LLAMA_LIKE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family: str, dtype: torch.dtype, token_batches: list[Tensor], tmp_path: Path):
    model = build_model(family).to(dtype)
    expected = logits(model, token_batches[0])
    prepared = prepare(model, INT8)
    for batch in token_batches:
        prepared(input_ids=batch)
    fake = copy.deepcopy(prepared)
    round_weights(fake)
    converted = convert(prepared)
    got = logits(converted, token_batches[0])
    assert got.dtype == dtype and relative(got.float(), expected.float()) < 0.25
    assert torch.equal(got, logits(fake, token_batches[0]))
    save_model(converted, RunFolder(tmp_path))
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded, token_batches[0]), got)
    assert loaded.config.dtype == dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_leaves_no_trace_in_any_statistic(family: str):
    generator = torch.Generator().manual_seed(9)
    short = torch.randint(3, 96, (2, 9), generator=generator)
    long = torch.cat(
        [short, torch.full((2, 5), 77)], dim=1
    )  # what is padding is a token of its own, not seen elsewhere
    mask = torch.zeros_like(long).index_fill(1, torch.arange(9), 1)
    plain, padded = prepare(build_model(family), INT8), prepare(build_model(family), INT8)
    plain(input_ids=short)
    with padding(mask):
        padded(input_ids=long, attention_mask=mask)
    found = {q.where: q.observer.range() for q in iter_quantizers(padded) if not isinstance(q, WeightQuantizer)}
    expected = {q.where: q.observer for q in iter_quantizers(plain) if not isinstance(q, WeightQuantizer)}
    assert list(found) == list(expected)
    for where, ranges in found.items():
        if family == "bert" and where.endswith((".scores", ".probs")):
            # every token sees all others: what the mask hides counts as zero, which every grid holds anyway
            ranges = tuple(bound.clamp(max=0) if bound is ranges[0] else bound for bound in ranges)
            expected[where].update(torch.zeros(1))
        for got, wanted in zip(ranges, expected[where].range(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, msg=where)


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_a_state_dict_loads_into_a_freshly_prepared_model(family: str, token_batches: list[Tensor]):
    mixed = PTQConfig(overrides={"*.down_proj": {"input": "int8:token:dyn"}, "*.o_proj": {"weight": "int4:g32:sym"}})
    trained = calibrated(family, token_batches, mixed)
    round_weights(trained)
    fresh = prepare(build_model(family), mixed)
    result = fresh.load_state_dict(trained.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(logits(fresh, token_batches[0]), logits(trained, token_batches[0]))
    assert torch.equal(logits(convert(fresh), token_batches[0]), logits(trained, token_batches[0]))


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_nothing_is_stored_for_the_longest_context(family: str):
    """No masks, no tables: what wrapping adds does not grow with `max_position_embeddings`."""
    model = build_model(family, max_position_embeddings=131072)
    before = stored(model)
    prepared = prepare(model, INT8)
    assert stored(prepared) - before < 2**20
    prepared(input_ids=torch.randint(3, 96, (1, 8)))
    assert stored(prepared) - before < 2**20


def stored(model: nn.Module) -> int:
    """Bytes of all tensors that any module of `model` holds, in whatever attribute."""
    storages = {}
    for module in model.modules():
        for tensor in tensors_in(vars(module)):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def tensors_in(value: object, depth: int = 4) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if depth == 0 or isinstance(value, nn.Module | type):
        return []
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_in(item, depth - 1)]
    if isinstance(value, list | tuple | set):
        return [t for item in value for t in tensors_in(item, depth - 1)]
    return tensors_in(vars(value), depth - 1) if hasattr(value, "__dict__") else []
