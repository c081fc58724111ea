"""Exports in GPTQ's and AWQ's layouts in their real runtime: transformers with GPTQModel, in an environment of its own,
as GPTQModel wants an older numpy, and peft imports GPTQModel wherever that is installed."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import wrapq
from tests.export.conftest import SMALL
from tests.export.test_int32_layouts import UnpackedAwq, UnpackedGptq  # noqa: F401 - which registers them
from tests.exports import export_of
from tests.models import random_model
from wrapq.engine.record import RunResult
from wrapq.export import reload
from wrapq.runtime.module import QuantizedWeight

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

READER = Path(__file__).with_name("gptqmodel_reader.py")
CLOSE = 1e-2
"""GPTQModel multiplies by 4-bit weights in bfloat16 on a CPU."""


@dataclass(frozen=True)
class Case:
    """A run whose export is read: the layout, the spec, and the model's family."""

    layout: str
    spec: str
    family: str
    words: tuple[str, ...] = ()


CASES = {
    "w4 asymmetric, a float layer and biases": Case(
        "gptq", "int4:g32:asym", "qwen2", ("+rules.down={match: {name: '*.1.mlp.down_proj'}, quantize: false}",)
    ),
    "w8, bfloat16": Case("gptq", "int8:channel:sym", "llama", ("model.dtype=bfloat16",)),
    "w3 asymmetric": Case("gptq", "int3:g32:asym", "llama"),
    "w2, float16": Case("gptq", "int2:g32:sym", "llama", ("model.dtype=float16",)),
    "awq, a float layer and biases": Case(
        "awq", "int4:g32:asym", "opt", ("+rules.one={match: {name: '*.0.fc1'}, quantize: false}",)
    ),
}
"""What the other test does not say, of which each takes seconds."""


def run(case: Case, folder: Path) -> RunResult:
    words = ["model=hf", f"model.path={random_model(case.family, folder / 'model')}", "evaluation.tokens=256"]
    words += [f"rules.linear.weight='{case.spec}:scale=float16'", *case.words]
    words += [f"+export.{case.layout}_unpacked={{beside_float: false}}", f"paths.outputs={folder}"]
    done = wrapq.run("w4a16_rtn", [*SMALL, *words])
    assert done is not None
    return done


def read_all(python: Path, folders: list[Path]) -> None:
    # without TorchDynamo: to compile how a weight is unpacked takes longer than all the rest
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [str(python), "-P", str(READER), reload.__file__, *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_gptqmodel_unpacks_our_weights_and_computes_our_logits(gptqmodel: Path, tmp_path: Path) -> None:
    ids = torch.randint(2048, (2, 24))
    runs = {name: run(case, tmp_path / str(i)) for i, (name, case) in enumerate(CASES.items())}
    for done in runs.values():
        save_file({"ids": ids}, export_of(done).path / "ids.safetensors")
    read_all(gptqmodel, [export_of(done).path for done in runs.values()])
    off = {}
    for name, done in runs.items():
        read, model = load_file(export_of(done).path / "read.safetensors"), wrapq.load(done.folder)
        theirs, ours = read.pop("logits"), model(input_ids=ids).logits.detach().float()
        off[name] = float((theirs - ours).norm() / ours.norm())
        layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedWeight)}
        assert read.keys() == layers.keys(), name
        for layer, weight in read.items():
            module = layers[layer]
            own = module.qparams("weight").dequantize(module.codes(), weight.dtype)
            assert torch.equal(weight, own), f"{name}: {layer}"
    assert all(value < CLOSE for value in off.values()), off
