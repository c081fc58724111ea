"""Sizes from shapes alone, against arithmetic, against a real run, and for a model no machine here could hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

import wrapq
from wrapq.engine.evaluate import unique_tensors
from wrapq.quant.spec import QuantSpec
from wrapq.recipe.compose import compose
from wrapq.resolve.estimate import weight_bytes
from wrapq.resolve.resolve import resolve

PLAN_SECONDS, PLAN_GIGABYTES = 10, 1.5


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        ("int4:g128:sym", 4 + 32 / 128),
        ("uint4:g128:asym", 4 + 64 / 128),
        ("int8:channel:sym", 8 + 32 / 512),
        ("int3:g64:sym", 3 + 32 / 64),
        ("int8:tensor:sym", 8 + 32 / (256 * 512)),
    ],
)
def test_bits_per_weight(spec: str, bits: float) -> None:
    assert 8 * weight_bytes((256, 512), QuantSpec.parse(spec)) / (256 * 512) == bits


def test_rows_that_do_not_fill_their_last_word() -> None:
    assert weight_bytes((10, 33), QuantSpec.parse("int4:channel:sym")) == 10 * 5 * 4 + 10 * 4


def test_bits_per_weight_of_a_plan() -> None:
    composed = compose(["recipe=w4a16_rtn"])
    assert resolve(composed.recipe, composed.sources).estimate.bits_per_weight == 4.25


@pytest.mark.parametrize("recipe", ["demo", "w4a16_rtn", "int16_activations"])
def test_the_estimated_size_is_the_real_one(recipe: str, tmp_path: Path) -> None:
    few = ["calibration.samples=4"] if recipe != "w4a16_rtn" else []
    result = wrapq.run(recipe, ["evaluation.tokens=512", *few, f"paths.outputs={tmp_path}", "tracking=none"])
    plan = json.loads((result.folder / "plan.json").read_text())
    real = sum(tensor.numel() * tensor.itemsize for tensor in unique_tensors(wrapq.load(result.folder)))
    assert plan["estimate"]["quantized_bytes"] == pytest.approx(real, rel=0.02)
    assert result.sizes["quantized"] == pytest.approx(real, rel=0.02)


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
    result = subprocess.run([sys.executable, "-c", script, *command], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["model"]["parameters"] == 70_553_706_496
    assert len(plan["modules"]) == 80 * 13 + 3
    memory, seconds = map(float, result.stderr.split()[-2:])  # of the processor: other tests may run beside
    gigabytes = memory * (1 if sys.platform == "darwin" else 1024) / 1e9
    assert seconds < PLAN_SECONDS
    assert gigabytes < PLAN_GIGABYTES
