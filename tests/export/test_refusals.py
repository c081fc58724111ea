"""What the format cannot say is refused in the plan, before anything is loaded, with the reason."""

from __future__ import annotations

import pytest

from tests.export.conftest import STATIC, TRANSFORMERS, cache_of, layers, weights
from wrapq.errors import PlanError, RecipeError, WrapqError
from wrapq.recipe.compose import compose
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve

INT8 = "+rules.more={match: {name: 'PATTERN'}, weight: 'int8:g128'}"
OTHERWISE = "quantize it otherwise, leave it float, or run with export=none"
WITHOUT_VLLM = "quantize it otherwise, or give vLLM up with export.reader=transformers"


def planned(*overrides: str) -> Plan:
    composed = compose(
        [*overrides, *(() if any(o.startswith("export") for o in overrides) else ("export=compressed_tensors",))]
    )
    return resolve(composed.recipe, composed.sources)


def refusal(*overrides: str) -> str:
    with pytest.raises(WrapqError) as error:
        planned(*overrides, "export=compressed_tensors")
    return str(error.value)


def test_three_bits_for_vllm() -> None:
    assert (
        refusal(*weights("int3:g128:sym"))
        == f"""\
1 problem in the plan:
  - rule linear, override rules.linear.weight=int3:g128:sym: model.layers.0.self_attn.q_proj and 27 more: vLLM has \
kernels for packed weights of 4 and 8 bits, not 3
    {WITHOUT_VLLM}"""
    )


def test_different_bits_in_what_vllm_fuses() -> None:
    assert (
        refusal(*weights("int4:g128"), INT8.replace("PATTERN", "*.k_proj"))
        == f"""\
1 problem in the plan:
  - model.layers.0.self_attn and 3 more: vLLM runs q_proj, k_proj and v_proj as one layer, which needs one spec, but \
q_proj is 4-bit by group of 128, k_proj is 8-bit by group of 128, v_proj is 4-bit by group of 128
    {WITHOUT_VLLM}"""
    )


def test_a_float_layer_in_what_vllm_fuses() -> None:
    leave = "+rules.leave={match: {name: '*.1.mlp.up_proj'}, quantize: false}"
    assert "gate_proj is 4-bit by group of 128, up_proj is float" in refusal(*weights("int4:g128"), leave)


def test_both_are_no_matter_for_transformers() -> None:
    planned(*weights("int3:g128"), INT8.replace("PATTERN", "*.k_proj"), "export=compressed_tensors", TRANSFORMERS)


def test_mixtures_that_fuse_nothing_are_no_matter() -> None:
    planned(*weights("int4:g128"), INT8.replace("PATTERN", "*.o_proj"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    {
        "inner points": (
            (*STATIC, "+rules.inner={match: {type: MLP}, points: {mul: 'int8:tensor'}}"),
            f"""model.layers.0.mlp and 3 more: compressed-tensors quantizes linear layers and the cache, not LlamaMLP
    {OTHERWISE}""",
        ),
        "probabilities": (
            (*STATIC, "+rules.inner={match: {type: Attention}, points: {probs: 'uint8:tensor'}}"),
            f"""model.layers.0.self_attn and 3 more: compressed-tensors has no word for the points probs
    {OTHERWISE}""",
        ),
        "embedding": (
            weights("int4:g128", "+rules.table={match: {type: Embedding}, weight: 'int8:channel'}"),
            "model.embed_tokens: compressed-tensors quantizes linear layers and the cache, not Embedding",
        ),
        "norm": (
            weights("int4:g128", "+rules.norm={match: {type: '*Norm'}, weight: 'int8:tensor'}"),
            "model.layers.0.input_layernorm and 8 more: compressed-tensors quantizes linear layers and the cache, not "
            "LlamaRMSNorm",
        ),
        "output": (
            (*STATIC, "+rules.linear.output=int8:tensor"),
            "output: compressed-tensors' readers quantize weights and inputs only",
        ),
        "output layer": (weights("int4:g128", "~rules.head"), "vLLM keeps the output layer (lm_head) in float"),
        "sixteen bits": (
            layers("int8:channel", "int16:tensor"),
            "input: int16:tensor:sym: compressed-tensors' readers hold numbers of at most 8 bits",
        ),
        "asymmetric weights with inputs": (
            layers("int8:channel:asym", "int8:token:dyn"),
            "vLLM needs symmetric weights where inputs are integers",
        ),
        "integer cache": (cache_of("int8:tensor"), "vLLM's quantized cache is fp8_e4m3 with one scale by tensor"),
        "fp4 in float32": (
            weights("nvfp4"),
            """compressed-tensors unpacks nvfp4-pack-quantized to bfloat16, which a model in float32 cannot multiply
    run with model.dtype=bfloat16""",
        ),
        "asymmetric beside others": (
            weights("int4:g128:asym", INT8.replace("PATTERN", "*.o_proj")),
            "transformers loads packed asymmetric weights only where all layers have one spec and a float cache",
        ),
    }.values(),
)  # fmt: skip
def test_reason(overrides: tuple[str, ...], said: str) -> None:
    assert said in refusal(*overrides)


def test_some_caches_only() -> None:
    some = cache_of("fp8_e4m3:tensor")
    said = refusal(*some, "+rules.cache.match.layers=0:2")
    assert "quantizes the cache of every block or of none, here 2 of 4" in said


def test_names_and_options_are_checked_without_a_model() -> None:
    with pytest.raises(RecipeError, match="unknown export format 'compresed'") as error:
        planned("recipe=w8a16", "export.format=compresed")
    assert "did you mean: compressed_tensors, none" in str(error.value)
    with pytest.raises(RecipeError, match="did you mean: reader"):
        planned("recipe=w8a16", "export=compressed_tensors", "+export.raeder=vllm")
    with pytest.raises(RecipeError, match="nothing reads it"):
        planned("recipe=w8a16", "export=none", "+export.reader=vllm")


def test_a_plan_without_export_is_not_asked() -> None:
    with pytest.raises(PlanError):
        planned(*weights("int3:g128"))
    planned(*weights("int3:g128"), "export=none")
