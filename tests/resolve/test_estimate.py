"""Sizes from shapes alone, against arithmetic, against a real run, and for a model no machine here could hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig

import wrapq
from wrapq.algorithms.rtn import RTN
from wrapq.quant.spec import QuantSpec
from wrapq.recipe.compose import compose
from wrapq.recipe.presets import list_presets
from wrapq.resolve.estimate import weight_bytes
from wrapq.resolve.resolve import resolve
from wrapq.runs.checkpoint import qparams_tensors, unique_tensors
from wrapq.wrappers.model import wrap_model

PLAN_SECONDS, PLAN_GIGABYTES = 4, 1.5
"""Beyond what importing the libraries takes, which is most of it and differs between machines."""


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        ("int4:g128:sym", 4 + 32 / 128),
        ("uint4:g128:asym", 4 + 40 / 128),
        ("int8:channel:sym", 8 + 32 / 512),
        ("int3:g64:sym", 3 + 32 / 64),
        ("int8:tensor:sym", 8 + 32 / (256 * 512)),
        ("uint4:g128:asym:zero=float", 4 + 64 / 128),
        ("int4:g64:asym:scale=bfloat16:zero=float", 4 + 32 / 64),
    ],
)
def test_bits_per_weight(spec: str, bits: float) -> None:
    assert 8 * weight_bytes((256, 512), QuantSpec.parse(spec)) / (256 * 512) == bits


def test_rows_that_do_not_fill_their_last_word() -> None:
    assert weight_bytes((10, 33), QuantSpec.parse("int4:channel:sym")) == 10 * 5 * 4 + 10 * 4


SCHEMES = {preset.name: preset.path for preset in list_presets() if preset.kind == "scheme"}
SAID = {name: yaml.safe_load(path.read_text()) for name, path in SCHEMES.items()}
WEIGHTS = {name: said["weight"] for name, said in SAID.items() if "weight" in said}
MORE = ("int4:b16x48", "uint3:b7x5:asym", "int5:channel@1", "uint8:tensor", "uint12:g16:asym:scale=float16", "fp6_e3m2")
MORE += ("int4:g16:asym:zero=float", "uint3:channel:asym:zero=float:scale=float16")


@pytest.mark.parametrize("text", [*WEIGHTS.values(), *MORE], ids=[*WEIGHTS, *MORE])
@pytest.mark.parametrize("rows", [48, 33])
def test_bytes_of_a_weight_are_those_of_its_tensors(text: str, rows: int) -> None:
    spec = QuantSpec.parse(text)
    layer = torch.nn.Linear(256, rows, bias=False).requires_grad_(False)
    wrapped = wrap_model(layer, {"": {"weight": spec}})
    rounded = RTN().round(wrapped.float_matrix(), spec, "weight")
    wrapped.weight_quantizer.set_rounded(rounded.integers, rounded.qparams)
    tensors = wrapped.converted().state_dict()
    assert set(tensors) >= {"weight_packed", "weight_shape", "weight_scale"}
    stored = sum(tensor.numel() * tensor.itemsize for name, tensor in tensors.items() if name != "weight_shape")
    assert weight_bytes((rows, 256), spec) == stored


def test_bits_per_weight_of_a_plan() -> None:
    composed = compose(["recipe=w4a16_rtn"])
    assert resolve(composed.recipe, composed.sources).estimate.bits_per_weight == 4.25


@pytest.mark.parametrize(
    "recipe", ["demo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("w4a16_rtn", "int16_activations"))]
)
def test_the_estimated_size_is_the_real_one(recipe: str, tmp_path: Path) -> None:
    few = ["calibration.samples=4"] if recipe != "w4a16_rtn" else []
    result = wrapq.run(recipe, ["evaluation.tokens=512", *few, f"paths.outputs={tmp_path}", "tracking=none"])
    plan = json.loads((result.folder / "plan.json").read_text())
    model = wrapq.load(result.folder)
    real = sum(tensor.numel() * tensor.itemsize for tensor in unique_tensors(model)[0].values())
    ranges = sum(
        tensor.numel() * tensor.itemsize for name, tensor in qparams_tensors(model).items() if ".weight_" not in name
    )
    assert plan["estimate"]["quantized_bytes"] == real - ranges
    assert plan["estimate"]["float_bytes"] == result.sizes["float"]
    assert result.sizes["quantized"] == pytest.approx(real, rel=0.02)


@pytest.mark.slow
def test_seventy_billion_parameters_in_seconds(tmp_path: Path) -> None:
    config = LlamaConfig(
        num_hidden_layers=80,
        hidden_size=8192,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path / "large")
    choice = ("recipe=int16_activations", "model=hf", f"model.path={tmp_path / 'large'}", "model.dtype=bfloat16")
    command = [sys.executable, "-m", "wrapq", "plan", "--json", *choice]
    # a process in between, whose only child is the plan, so that no other child's memory is counted
    script = "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]).returncode;"
    script += "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
    script += "print(used.ru_maxrss, used.ru_utime + used.ru_stime, file=sys.stderr); sys.exit(done)"
    imports = [sys.executable, "-c", "import torch, transformers; transformers.LlamaForCausalLM"]
    started, result = (
        subprocess.run([sys.executable, "-c", script, *run], cwd=tmp_path, capture_output=True, text=True, check=True)
        for run in (imports, command)
    )
    plan = json.loads(result.stdout)
    assert plan["model"]["parameters"] == 70_553_706_496
    assert len(plan["modules"]) == 80 * 13 + 3
    importing = float(started.stderr.split()[-1])  # of the processor: other tests may run beside
    memory, seconds = map(float, result.stderr.split()[-2:])
    gigabytes = memory * (1 if sys.platform == "darwin" else 1024) / 1e9
    assert seconds - importing < PLAN_SECONDS
    assert gigabytes < PLAN_GIGABYTES
