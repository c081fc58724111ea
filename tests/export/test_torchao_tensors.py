"""Checkpoints of torchao's tensors: their numbers are ours, and transformers computes with them what we do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import wrapq
from tests.export.test_onnx_model import CALIBRATED, SMALL
from tests.export.test_refusals import planned
from tests.exports import export_of
from tests.models import random_model
from wrapq.errors import PlanError
from wrapq.export.torchao_tensors import _tensor

pytest.importorskip("torchao")

ALONE = "export.torchao.beside_float=false"


SPECS = (
    *("int8:channel:sym", "int8:channel:asym", "uint8:g32:asym", "int4:g32:sym:signed"),
    *("uint4:channel:asym", "int2:g16:asym", "uint5:g32:sym"),
)


@pytest.mark.parametrize("inputs", [None, "int8:token:asym:dyn"])
@pytest.mark.parametrize("weight", SPECS)
def test_a_tensor_holds_our_weight_to_the_bit(weight: str, inputs: str | None) -> None:
    layer = nn.Linear(64, 24)
    layer = wrapq.convert(wrapq.prepare(layer, wrapq.PTQConfig(weight=weight, activation=inputs)))
    made = _tensor(layer)
    assert torch.equal(made.dequantize(), layer.weight)
    x = torch.randn(3, 5, 64)
    theirs, ours = nn.functional.linear(x, made, layer.bias), layer(x)
    assert (theirs - ours).norm() <= (1e-6 if inputs is None else 1e-2) * ours.norm()


RUNS = {
    "w4a16_gptq": (CALIBRATED, 1e-5),
    "w8a16": (("model.dtype=bfloat16",), 2e-2),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RUNS)
def test_a_run_exports_what_it_measured(recipe: str, tmp_path: Path) -> None:
    words, allowed = RUNS[recipe]
    done = wrapq.run(recipe, [*words, *SMALL, "export=torchao", ALONE, f"paths.outputs={tmp_path}"])
    exported = export_of(done)
    assert exported.error <= allowed and exported.figures["top1_agreement"] > 0.95
    assert exported.figures["token_ms"] > 0 and exported.figures["greedy_agreement"] > 0.2


@pytest.mark.slow
def test_layers_of_several_specs_and_layers_left_float(tmp_path: Path) -> None:
    path = random_model("qwen2", tmp_path / "model")
    words = ["rules.linear.weight=int4:g32:asym", "+rules.up={match: {name: '*.up_proj'}, weight: 'int8:channel'}"]
    words += ["+rules.down={match: {name: '*.0.mlp.down_proj'}, quantize: false}", "~rules.head", "model=hf"]
    done = wrapq.run(
        "w4a16_rtn", [*words, *SMALL, f"model.path={path}", "export=torchao", ALONE, f"paths.outputs={tmp_path}"]
    )
    exported = export_of(done)
    assert exported.error <= 1e-5
    said = json.loads((exported.path / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "torchao" and "0.mlp.down_proj" not in json.dumps(said)
    assert "Int8WeightOnlyConfig" in json.dumps(said) and "IntxWeightOnlyConfig" in json.dumps(said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rules.linear.weight=nf4:g32"], "its tensors have integers of 2 to 8 bits\n    quantize it in int4:g32:sym"),
        (["rules.linear.weight=int8:tensor"], "by group\n    quantize it in int8:channel:sym"),
        (["rules.linear.input=int8:token:sym:dyn"], "with a zero point\n    quantize it in int8:token:asym:dyn"),
        (["rules.linear.input=int8:tensor:asym", "+algorithm@stack.ranges=ranges"], "token by token, as they come"),
        (["+rules.linear.output=int8:token:dyn"], "say nothing of the output\n    leave it float"),
        (["+rules.embed={match: {type: Embedding}, weight: 'int8:channel'}"], "not in Embedding"),
        (["float_prefix=1"], "torchao has no word for first tokens that stay float"),
    ],
)
def test_what_torchao_does_not_say_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(PlanError) as error:
        planned("recipe=w4a16_rtn", "export=torchao", *words)
    assert said in str(error.value)
