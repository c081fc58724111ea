"""GPTQ's and AWQ's layouts: read by their descriptions they hold our weights, and the plan refuses what they do not."""

from __future__ import annotations

import dataclasses
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wrapq
from tests.export.conftest import SMALL, cache_of
from tests.export.test_refusals import planned
from tests.export.unpacked import awq_weight, dequantized, gptq_weight, quantization_of
from tests.exports import export_of
from tests.models import random_model
from wrapq.errors import ModelError, PlanError
from wrapq.export import base
from wrapq.export.awq_layout import AwqLayout
from wrapq.export.base import EXPORTERS, Reading
from wrapq.export.gptq_layout import GptqLayout
from wrapq.export.int32_layout import packed_weight
from wrapq.runtime.module import QuantizedWeight

EXACT = 1e-5
"""Sums in another order."""
HALF = "scale=float16"
GPTQ_SPECS = [
    *(f"int{bits}:g32:{kind}:{HALF}" for bits in (2, 3, 4, 8) for kind in ("sym", "asym")),
    f"int4:g32:sym:signed:{HALF}",
    f"uint4:g16:asym:{HALF}",
    f"uint8:channel:sym:{HALF}",
    f"int4:channel:sym:{HALF}",
    f"int4:tensor:asym:{HALF}",
]


class Unpacked:
    """Reads an export by the description of its layout, in this process."""

    extra = ("gptq", ())

    def read(self, folder: Path, ids: Tensor, device: str) -> Reading:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        del config.quantization_config
        model, (weights, others) = AutoModelForCausalLM.from_config(config).eval(), dequantized(folder)
        model.load_state_dict({**others, **{f"{name}.weight": weight for name, weight in weights.items()}})
        return Reading(model(input_ids=ids).logits.detach().float())


@EXPORTERS.register("gptq_unpacked")
class UnpackedGptq(Unpacked, GptqLayout):
    """As `gptq`, without GPTQModel."""


@EXPORTERS.register("awq_unpacked")
class UnpackedAwq(Unpacked, AwqLayout):
    """As `awq`, without GPTQModel."""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all that `gptq` and `awq` are read with were installed; nothing is read in these tests."""
    monkeypatch.setattr(base, "version", lambda package: "1")


def converted(spec: str) -> QuantizedWeight:
    return wrapq.convert(wrapq.prepare(nn.Linear(96, 64), wrapq.PTQConfig(weight=spec, activation=None)))


def gptq_tensors(layer: QuantizedWeight, symmetric: bool) -> dict[str, Tensor]:
    return GptqLayout().tensors(packed_weight(layer), layer.specs["weight"].dtype.bits, symmetric)


@pytest.mark.parametrize("spec", GPTQ_SPECS)
def test_gptq_holds_the_weight_to_the_bit(spec: str) -> None:
    layer = converted(spec)
    middle = ":sym" in spec and "uint" not in spec
    for symmetric in (True, False) if middle else (False,):
        version = "gptq" if symmetric else "gptq_v2"
        said = {"bits": layer.specs["weight"].dtype.bits, "checkpoint_format": version, "desc_act": False}
        tensors = gptq_tensors(layer, symmetric)
        assert torch.equal(
            gptq_weight(tensors, said | {"group_size": layer.specs["weight"].group_size or -1}), layer.weight
        )
        assert {name: tensor.dtype for name, tensor in tensors.items()} == {
            "qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32
        }  # fmt: skip


@pytest.mark.parametrize("spec", [spec for spec in GPTQ_SPECS if "int4" in spec])
def test_awq_holds_the_weight_to_the_bit(spec: str) -> None:
    layer = converted(spec)
    tensors = AwqLayout().tensors(packed_weight(layer), 4, False)
    assert torch.equal(awq_weight(tensors, {"group_size": layer.specs["weight"].group_size or -1}), layer.weight)
    assert tensors["qweight"].shape == (layer.matrix_shape[1], layer.matrix_shape[0] // 8)


def test_three_bits_are_packed_32_in_three_words() -> None:
    layer = converted(f"int3:g32:sym:{HALF}")
    rows, columns = layer.matrix_shape
    assert gptq_tensors(layer, True)["qweight"].shape == (3 * columns // 32, rows)


@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_groups_in_activation_order(kind: str) -> None:
    layer = converted(f"int4:g32:{kind}:{HALF}")
    qparams = layer.qparams("weight")
    ordered = dataclasses.replace(qparams, permutation=torch.randperm(layer.matrix_shape[1]))
    layer.set_weight(layer.codes(), ordered)
    said = {"bits": 4, "checkpoint_format": "gptq_v2", "desc_act": True}
    assert packed_weight(layer).ordered
    assert torch.equal(gptq_weight(gptq_tensors(layer, False), said), layer.weight)
    with pytest.raises(ModelError, match=r"a: AWQ's layout has no place for groups that follow an activation order"):
        AwqLayout().quantization_config(layer, planned("recipe=w4a16_rtn"), {"a": packed_weight(layer)})


def run(recipe: str, export: str, folder: Path, *words: str) -> wrapq.engine.record.RunResult:
    small = [*SMALL, "evaluation.tokens=512"]
    done = wrapq.run(recipe, [*small, *words, f"+export.{export}={{beside_float: false}}", f"paths.outputs={folder}"])
    assert done is not None
    return done


LLAMA = {
    "gptq": ("gptq_unpacked", "int4:g32:sym"),
    "gptq_v2": ("gptq_unpacked", "int4:g32:asym"),
    "awq": ("awq_unpacked", "int4:g32:asym"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "gptq" else pytest.mark.slow) for n in LLAMA])
def test_a_run_leaves_a_whole_checkpoint(name: str, tmp_path: Path) -> None:
    export, spec = LLAMA[name]
    path = random_model("llama", tmp_path / "model")
    words = ("model=hf", f"model.path={path}", f"rules.linear.weight='{spec}:{HALF}'")
    float_layer = "+rules.up={match: {name: '*.1.mlp.down_proj'}, quantize: false}"
    done = run("w4a16_rtn", export, tmp_path, *words, float_layer)
    assert export_of(done).error < EXACT and not any("rounded" in note for note in export_of(done).notes)
    folder = export_of(done).path
    weights, others = dequantized(folder)
    model = wrapq.load(done.folder)
    assert len(weights) == 13 and {"lm_head.weight", "model.layers.1.mlp.down_proj.weight"} <= others.keys()
    assert all(torch.equal(weight, model.get_submodule(name).weight) for name, weight in weights.items())
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    said = quantization_of(folder)
    if name == "awq":
        assert (said["version"], said["zero_point"], said["bits"], said["group_size"]) == ("gemm", True, 4, 32)
        assert said["modules_to_not_convert"] == ["model.layers.1.mlp.down_proj", "lm_head"]
    else:
        assert said["checkpoint_format"] == name and said["sym"] == (name == "gptq") and not said["desc_act"]
        assert [sorted(names) for names in said["modules_in_block_to_quantize"]] == [sorted(weights)]
        assert said["dynamic"] == {r"-:^model\.layers\.1\.mlp\.down_proj$": {}}


def test_what_is_rounded_and_what_vllm_does_not_read_are_said(installed: None) -> None:
    def notes(*words: str) -> list[str]:
        plan = planned("recipe=w4a16_rtn", *words)
        ((name, config),) = plan.recipe.export.items()
        return list(wrapq.export.base.make_exporter(name, config).notes(plan))

    assert notes("export=gptq", f"rules.linear.weight='int4:g128:sym:{HALF}'") == []
    rounded, vllm = notes("export=gptq", "rules.linear.weight=int3:g128:asym")
    assert rounded == "scales are rounded to float16; scale=float16 in a spec calibrates with such ones"
    assert vllm.startswith("vLLM reads this layout with symmetric weights of 4 or 8 bits; export=awq")
    assert notes("export=awq", f"rules.linear.weight='int4:g128:asym:{HALF}'") == []
    leave = "+rules.leave={match: {name: '*.1.mlp.up_proj'}, quantize: false}"
    (fused,) = notes("export=gptq", f"rules.linear.weight='int4:g128:sym:{HALF}'", leave)
    assert fused.startswith("model.layers.1.mlp: vLLM runs gate_proj and up_proj as one layer")


def test_fused_layers_that_are_all_float_are_named_as_engines_call_them(installed: None) -> None:
    leave = "+rules.leave={match: {name: '*.0.self_attn.[qkv]_proj'}, quantize: false}"
    plan, model = planned("recipe=w4a16_rtn", leave, "export=gptq"), nn.Module()
    quantized = [module.name for module in plan.modules]
    names = [*quantized, *(row.name for row in plan.untouched if row.type == "Linear")]
    for name in names:
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name.rpartition(".")[2], nn.Linear(2, 2))
    said = GptqLayout().quantization_config(model, plan, {name: converted_layer() for name in quantized})
    parts = [rf"-:^model\.layers\.0\.self_attn\.{part}_proj$" for part in ("q", "k", "v", "qkv")]
    assert list(said["dynamic"]) == parts


def converted_layer() -> object:
    return packed_weight(converted("int4:g32:sym"))


def refusal(*words: str) -> str:
    with pytest.raises(PlanError) as error:
        planned(*words)
    return str(error.value)


RTN = "recipe=w4a16_rtn"
REFUSED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "inputs": (
        ("recipe=w8a8_dynamic", "export=gptq"),
        "GPTQ's layout has weights alone, and input is int8:token:sym:dyn",
        "leave input float, or run with export=none",
    ),
    "inputs and bits": (
        ("recipe=w8a8_dynamic", "export=awq"),
        "AWQ's layout has weights alone, and input is int8:token:sym:dyn",
        "leave input float and quantize its weight as int4:channel:sym, or run with export=none",
    ),
    "bits": (
        (RTN, "rules.linear.weight=int6:g128:asym", "export=gptq"),
        "int6:g128:asym: GPTQ's layout has integers of 2, 3, 4 or 8 bits",
        "quantize it as int8:g128:asym, leave it float, or run with export=none",
    ),
    "a codebook": (
        (RTN, "rules.linear.weight=nf4:g64", "export=awq"),
        "nf4:g64:sym: AWQ's layout has integers of 4 bits",
        "quantize it as int4:g64:sym",
    ),
    "groups": (
        (RTN, "rules.linear.weight=int4:g8:asym", "export=awq"),
        "int4:g8:asym: AWQ's layout is read by channel and in groups of 32, 64 or 128",
        "quantize it as int4:g32:asym",
    ),
    "blocks": (
        (RTN, "rules.linear.weight=int8:b128x128", "export=gptq"),
        "int8:b128x128:sym: GPTQ's layout has scales by channel and by group of inputs",
        "quantize it as int8:g128:sym",
    ),
    "input channels": (
        (RTN, "rules.linear.weight=int8:channel@1", "export=gptq"),
        "GPTQ's layout has scales by channel and by group of inputs",
        "quantize it as int8:channel:sym",
    ),
    "float zero points": (
        (RTN, "rules.linear.weight='int4:g128:asym:zero=float'", "export=awq"),
        "zero points of AWQ's layout are integers",
        "quantize it as int4:g128:asym",
    ),
    "several schemes": (
        (RTN, "+rules.down={match: {name: '*.down_proj'}, weight: 'int8:g64:asym'}", "export=gptq"),
        "model.layers.0.mlp.down_proj and 3 more: GPTQ's layout has one scheme for all layers, and most are 4-bit by "
        "group of 128",
        "quantize it as int4:g128:asym, leave it float, or run with export=none",
    ),
    "the head": (
        (RTN, "~rules.head", "export=gptq"),
        "lm_head: transformers reads GPTQ's layout in blocks alone, and leaves the layers outside them float",
        "leave it float, or run with export=none",
    ),
    "an embedding": (
        (RTN, "+rules.table={match: {type: Embedding}, weight: 'int8:channel'}", "export=awq"),
        "model.embed_tokens: AWQ's layout has linear layers alone, not Embedding",
        "leave it float, or run with export=none",
    ),
    "a cache": (
        (*cache_of("fp8_e4m3:tensor"), "export=gptq"),
        "model.layers.0.self_attn and 3 more: GPTQ's layout has linear layers alone, not LlamaAttention",
        "leave it float, or run with export=none",
    ),
    "a low-rank repair": (
        (RTN, "+algorithm@stack.repair=low_rank", "export=gptq"),
        "GPTQ's layout has no word for a low-rank repair beside the weight",
        "leave it out with ~stack.repair, or run with export=none",
    ),
    "online rotations": (
        ("recipe=w4a4_rotated_gptq", "rules.linear.input=float", "export=awq"),
        "rotate changes what comes to it at each forward, and readers would drop that",
        "leave it out",
    ),
    "a float prefix": (
        (RTN, "float_prefix=1", "export=awq"),
        "AWQ's layout has no word for first tokens that stay float, and readers would quantize them",
        "run with float_prefix=0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_plan_refuses(name: str, installed: None) -> None:
    words, reason, remedy = REFUSED[name]
    said = refusal(*words)
    assert reason in said and f"\n    {remedy}" in said, said


def test_outputs_that_fill_no_word(tmp_path: Path, installed: None) -> None:
    path = random_model("llama", tmp_path, intermediate_size=68)
    said = refusal(RTN, "model=hf", f"model.path={path}", "rules.linear.weight=int3:channel", "export=gptq")
    assert "GPTQModel takes no 3-bit weight of 68 outputs and 64 inputs\n    quantize it as int8:channel:sym" in said


def test_layers_that_transformers_initializes_before_it_unpacks_them(tmp_path: Path, installed: None) -> None:
    words = ("model=hf", f"model.path={random_model('gpt_bigcode', tmp_path)}", "rules.linear.weight=int8:channel")
    said = refusal(RTN, *words, "export=gptq")
    assert "transformer.h.0.attn.c_proj and 3 more: transformers does not load a GPTBigCodeForCausalLM whose" in said


def test_experts(tmp_path: Path, installed: None) -> None:
    words = ("model=hf", f"model.path={random_model('qwen2_moe', tmp_path)}", "rules.linear.weight=int4:g32:sym")
    assert "transformers does not put experts together from AWQ's layout" in refusal(RTN, *words, "export=awq")
    leave = "+rules.experts={match: {name: '*.experts.*'}, quantize: false}"
    assert planned(RTN, *words, leave, "export=awq").modules


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(base, "version", absent)
    with pytest.raises(PlanError, match=r"with gptqmodel and accelerate, which are not installed\n.*wrapq\[gptq\]"):
        planned(RTN, "export=awq")
