"""What the format cannot say is refused in the plan, before anything is loaded, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.export.conftest import STATIC, TRANSFORMERS, cache_of, layers, scheme_of, weights
from tests.models import random_model
from wrapq.errors import PlanError, RecipeError, WrapqError
from wrapq.export import compressed_tensors as exporter_module
from wrapq.export.vllm import fusion_refusals, linear_note, linear_refusal, unequal_global_scales
from wrapq.recipe.compose import compose
from wrapq.recipe.schema import Recipe
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve

INT8 = "+rules.more={match: {name: 'PATTERN'}, weight: 'int8:g128'}"
OTHERWISE = "quantize it otherwise, leave it float, or run with export=none"
WITHOUT_VLLM = "quantize it otherwise, or give vLLM up with export.compressed_tensors.reader=transformers"


def planned(*overrides: str) -> Plan:
    composed = compose(
        [*overrides, *(() if any(o.startswith("export") for o in overrides) else ("export=compressed_tensors",))]
    )
    return resolve(composed.recipe, composed.sources)


def refusal(*overrides: str) -> str:
    with pytest.raises(WrapqError) as error:
        planned(*overrides, "export=compressed_tensors")
    return str(error.value)


def test_integer_inputs_with_a_range_for_narrow_weights() -> None:
    assert (
        refusal(*layers("int4:g128:sym", "int8:tensor"))
        == f"""\
1 problem in the plan:
  - rule linear, override rules.linear.weight=int4:g128:sym + rule linear, override rules.linear.input=int8:tensor: \
model.layers.0.self_attn.q_proj and 27 more: vLLM runs integer inputs with weights of 8 bits by tensor or channel, or \
of fewer with dynamic inputs
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
    narrow = layers("int4:g128:sym", "int8:tensor")
    planned(*narrow, INT8.replace("PATTERN", "*.k_proj"), "export=compressed_tensors", TRANSFORMERS)


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
        "sixteen bits": (
            layers("int8:channel", "int16:tensor"),
            "input: int16:tensor:sym: compressed-tensors' readers hold numbers of at most 8 bits",
        ),
        "float zero points": (
            weights("'int4:g128:asym:zero=float'"),
            "weight: int4:g128:asym:zero=float: compressed-tensors' zero points are integers",
        ),
        "asymmetric weights with inputs": (
            layers("int8:channel:asym", "int8:token:dyn"),
            "vLLM needs symmetric weights where inputs are integers",
        ),
        "integer cache": (
            cache_of("int8:tensor"),
            "vLLM's quantized cache is fp8_e4m3, with one scale by tensor or head",
        ),
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


RUNS = {
    "int2:g64:asym": None,
    "int5:channel": None,
    "int4:g128": "int4:token:dyn",
    "int6:channel": "int8:g128:dyn",
    "int4:g128:sym": "fp8_e4m3:token:dyn",
    "int8:channel": "int8:token:asym:dyn",
    "fp8_e4m3:channel": None,
    "fp8_e4m3:tensor": "fp8_e4m3:tensor",
    "fp8_e4m3:b128x128": "fp8_e4m3:g128:dyn",
    "nvfp4": "nvfp4:local",
    "mxfp4": "fp8_e4m3:token:dyn",
    "mxfp8": "mxfp8:dyn",
}
STOPS = {
    ("int4:g32", "fp8_e4m3:token:dyn"): "int4 weights that are symmetric by g128",
    ("int8:g128", "int8:token:dyn"): "weights of 8 bits by tensor or channel",
    ("int4:g128", "int4:token:asym:dyn"): "packed weights with 4 or 8 bits, symmetric",
    ("int4:g128:asym", "int8:token:dyn"): "symmetric weights",
    ("int8:channel", "int4:token:dyn"): "integer inputs of 8 bits",
    ("fp8_e4m3:g128", None): "fp8 weights by tensor, channel or block",
    ("fp8_e4m3:channel", "int8:token:dyn"): "fp8 weights with fp8 inputs",
    ("fp8_e4m3:channel", "fp8_e4m3:tensor:dyn"): "dynamic fp8 inputs by token",
    ("fp8_e4m3:b128x128", "fp8_e4m3:g64:dyn"): "groups as wide as a block",
    ("fp8_e4m3:b128x128", "fp8_e4m3:tensor"): "none with weights in blocks",
    ("nvfp4", "nvfp4:dyn"): "nvfp4:local",
    ("mxfp4", "int8:token:dyn"): "MXFP4 weights with",
    ("mxfp8", "fp8_e4m3:token:dyn"): "MXFP8 weights with",
}


@pytest.mark.parametrize(("weight", "inputs"), RUNS.items())
def test_vllm_runs(weight: str, inputs: str | None) -> None:
    assert linear_refusal(scheme_of(weight, inputs)) is None


@pytest.mark.parametrize(("weight", "inputs"), STOPS)
def test_vllm_does_not_run(weight: str, inputs: str | None) -> None:
    assert STOPS[weight, inputs] in (linear_refusal(scheme_of(weight, inputs)) or "")


def test_blocks_that_run_from_one_layer_into_the_next() -> None:
    scheme = scheme_of("fp8_e4m3:b128x128", "fp8_e4m3:g128:dyn")
    layers = {f"a.{name}": scheme for name in ("q_proj", "k_proj", "v_proj")}
    assert not list(fusion_refusals(layers, {"a.q_proj": 256, "a.k_proj": 128, "a.v_proj": 64}))
    ((where, what),) = fusion_refusals(layers, {"a.q_proj": 256, "a.k_proj": 64, "a.v_proj": 64})
    assert where == "a" and "a block of k_proj is not whole" in what


NOTES = {
    ("int4:g128", None): "",
    ("int3:g128", None): "vLLM runs 3-bit by group of 128 on CUDA only",
    ("int4:g128", "int4:token:dyn"): "vLLM runs 4-bit by group of 128 with 4-bit by token inputs on CUDA only",
    ("int4:g128:sym", "fp8_e4m3:token:dyn"): "on Hopper GPUs only",
    ("mxfp4", None): "quantizes the inputs of MXFP4 weights too",
    ("mxfp4", "mxfp4:dyn"): "leaves the inputs of MXFP4 weights float",
    ("mxfp4", "fp8_e4m3:token:dyn"): "",
    ("mxfp8", None): "quantizes the inputs of MXFP8 weights too",
    ("fp8_e4m3:tensor", "fp8_e4m3:tensor"): "to the largest of their scales",
    ("fp8_e4m3:channel", "fp8_e4m3:token:dyn"): "",
}


@pytest.mark.parametrize(("weight", "inputs"), NOTES)
def test_what_vllm_does_otherwise_is_said(weight: str, inputs: str | None) -> None:
    note, expected = linear_note(scheme_of(weight, inputs)), NOTES[weight, inputs]
    assert expected in note if expected and note else bool(note) == bool(expected)


def test_an_old_or_missing_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter_module, "_version", lambda: None)
    said = refusal(*weights("int4:g128"))
    assert "needs compressed-tensors 0.15.0 or newer; it is not installed" in said
    assert "pip install 'wrapq[export]'" in said
    monkeypatch.setattr(exporter_module, "_version", lambda: "0.14.0.1")
    assert "0.15.0 or newer; it is 0.14.0.1 here" in refusal(*weights("int4:g128"))


def test_some_caches_only() -> None:
    some = cache_of("fp8_e4m3:tensor")
    said = refusal(*some, "+rules.cache.match.layers=0:2")
    assert "quantizes the cache of every block or of none, here 2 of 4" in said


def test_names_and_options_are_checked_without_a_model() -> None:
    with pytest.raises(RecipeError, match="unknown export format 'compresed'") as error:
        planned("recipe=w8a16", "+export.compresed={}")
    assert "did you mean: compressed_tensors" in str(error.value)
    with pytest.raises(RecipeError, match=r"unknown export 'onx'\n.*did you mean: onnx"):
        planned("recipe=w8a16", "export=[openvino,onx]")
    with pytest.raises(RecipeError, match="did you mean: reader"):
        planned("recipe=w8a16", "export=compressed_tensors", "+export.compressed_tensors.raeder=vllm")
    with pytest.raises(RecipeError, match=r"a mapping of keys to values is expected\n.*export\.FORMAT\.reader"):
        planned("recipe=w8a16", "export=none", "+export.reader=vllm")
    with pytest.raises(RecipeError, match="is not the name of a model"):
        planned("model=[hf,demo]")


def test_records_of_one_export_are_read() -> None:
    recipe = planned("recipe=w8a16", "export=compressed_tensors").recipe
    for format_name, options in (("none", {}), ("compressed_tensors", {"reader": "vllm"})):
        before = Recipe.model_validate({**recipe.model_dump(), "export": {"format": format_name, **options}})
        assert before == recipe.model_copy(update={"export": before.export})
        assert {name: export.options for name, export in before.export.items()} == (
            {format_name: options} if options else {}
        )


def test_a_plan_without_export_is_not_asked() -> None:
    with pytest.raises(PlanError):
        planned(*weights("int4:channel@1"))
    planned(*weights("int4:channel@1"), "export=none")


def test_the_plan_shows_what_the_export_says_of_each_kind_of_layer() -> None:
    eight = "+rules.mlp={match: {name: '*.mlp.*', type: Linear}, weight: 'int8:channel', input: 'int8:token:dyn'}"
    plan = planned(*weights("int4:g128", eight))
    assert list(exporter_module.CompressedTensors().layers(plan)) == [
        "pack-quantized: 16 layers, 4-bit by group of 128",
        "int-quantized: 12 layers, 8-bit by channel with 8-bit by token inputs",
    ]
    cache = planned(*cache_of("fp8_e4m3:tensor"))
    assert list(exporter_module.CompressedTensors().layers(cache))[1:] == ["kv_cache_scheme: 8-bit by tensor"]


def test_global_scales_that_vllm_would_merge_are_found() -> None:
    """Those of a run that is older than their sharing, say."""
    parts = ("a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj")
    tensors = {f"{part}.weight_global_scale": torch.full((1,), 2.0) for part in parts}
    tensors["a.o_proj.weight_global_scale"] += 1  # nothing is fused with it
    assert not list(unequal_global_scales(tensors))
    tensors["a.v_proj.weight_global_scale"] += 1
    said = next(unequal_global_scales(tensors))
    assert said == "vLLM runs a.q_proj and a.v_proj as one layer, but their weight_global_scale differ"


def test_rotations_at_each_forward(tmp_path: Path) -> None:
    turn = ("+algorithm@stack.turn=rotate", "stack.turn.rotations=[R4]")
    base = (*layers("int8:channel:sym", "int8:token:sym:dyn"), *turn)
    plan = planned(*base)
    assert set(plan.stages[0].hadamard) == {f"model.layers.{i}.mlp.down_proj" for i in range(4)}
    (note,) = exporter_module.CompressedTensors().notes(plan)
    assert "on GPUs only, by matrices of 512 x 512 or less" in note and "block=128 in stack.turn" in note
    said = refusal(*base, "stack.turn.matrix=orthogonal")
    assert "model.layers.0.mlp.down_proj and 3 more: turn changes what comes to it at each forward" in said
    assert "stack.turn.rotations=[R1,R2]" in said
    path = f"model.path={random_model('opt', tmp_path)}"
    assert "vLLM does not rotate the input of a layer that has a bias" in refusal(*base, path)
    assert planned(*base, path, "export=compressed_tensors", TRANSFORMERS).stages[0].hadamard


def test_rotations_of_queries_and_keys() -> None:
    turn = ("+algorithm@stack.turn=rotate", "stack.turn.rotations=[R3]", TRANSFORMERS, "export=compressed_tensors")
    said = refusal(*cache_of("fp8_e4m3:tensor"), *turn)
    assert "model.layers.0.self_attn and 3 more: turn changes what comes to it at each forward" in said


def test_first_tokens_that_stay_float() -> None:
    said = refusal(*layers("int8:channel:sym", "int8:token:sym:dyn"), "float_prefix=1")
    assert "float_prefix: compressed-tensors has no word for first tokens that stay float" in said
    assert "run with float_prefix=0" in said


def test_inputs_divided_at_each_forward(tmp_path: Path) -> None:
    smooth = ("+algorithm@stack.smooth=smoothquant", "stack.smooth.feeds=online")
    model = f"model.path={random_model('gpt2', tmp_path)}"
    said = refusal(*layers("int8:channel:sym", "int8:token:sym:dyn"), *smooth, model)
    assert "smooth changes what comes to it at each forward" in said and "stack.smooth.feeds=all" in said


def test_experts_of_integers(tmp_path: Path) -> None:
    """A layer of experts is one tensor to transformers, which it makes from most formats."""
    model = f"model.path={random_model('qwen2_moe', tmp_path)}"
    said = refusal("recipe=w8a8_dynamic", model)
    assert "mlp.experts.0.gate_proj and" in said and "of weights only, and leaves their inputs float" in said
    assert "experts together of weights with zero points" in refusal(*weights("int4:g32:asym"), model)
    assert "experts together of blocks of fp8" in refusal(*weights("fp8_e4m3:b32x32"), model, TRANSFORMERS)
    planned("recipe=w8a16", model, "rules.linear.weight.group_size=32")
    left = "+rules.experts={match: {name: '*.experts.*'}, quantize: false}"
    planned("recipe=w8a8_dynamic", model, left)
    other = f"model.path={random_model('mixtral', tmp_path / 'other')}"
    said = refusal(*weights("int4:g32"), left, other)
    assert "vLLM does not read float experts of MixtralForCausalLM out of one tensor" in said
    assert planned(*weights("int4:g32"), left, other, "export=compressed_tensors", TRANSFORMERS).modules
    eight = INT8.replace("PATTERN", "*.experts.*.down_proj").replace("g128", "g32")
    assert "transformers and vLLM take one spec for all experts" in refusal(*weights("int4:g32"), eight, model)


def test_experts_that_no_reader_takes_one_by_one(tmp_path: Path) -> None:
    model = f"model.path={random_model('llama4', tmp_path)}"
    said = refusal(*weights("int4:g32"), model)
    what = "no reader is known here that takes experts of Llama4ForCausalLM one by one"
    assert f"{what}\n    leave it float, or run with export=none" in said


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    """vLLM reads them one by one where its loader has names for what a format stores."""
    model = f"model.path={random_model('gpt_oss', tmp_path)}"
    assert planned(*weights("int4:g32"), model, "export=compressed_tensors").modules
    what = "vLLM reads experts of GptOssForCausalLM with packed symmetric weights and float inputs alone"
    assert what in refusal(*weights("int4:g32:asym"), model)
    fp8 = weights("fp8_e4m3:channel")
    assert what in refusal(*fp8, model)


def test_layers_that_transformers_initializes_before_it_unpacks_them(tmp_path: Path) -> None:
    path = f"model.path={random_model('gpt_bigcode', tmp_path)}"
    said = refusal(path, *weights("int8:channel"), TRANSFORMERS)
    what = "transformers does not load a GPTBigCodeForCausalLM whose Linear there is not a float"
    assert f"transformer.h.0.attn.c_proj and 3 more: {what}: it initializes the weight\n    {OTHERWISE}" in said
    left = "+rules.left={match: {name: '*.c_proj'}, quantize: false}"
    assert planned(path, *weights("int8:channel"), "export=compressed_tensors", TRANSFORMERS, left).modules
