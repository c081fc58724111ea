"""Gemma 3 270M, bf16, of 262,144 words and with norms that write into its stream: what shipped recipes keep of it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wrapq.export.gguf.writer import write_gguf
from wrapq.export.gguf_model import Gguf
from wrapq.export.reload import greedy
from wrapq.export.run_gguf import MODEL

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]
SMALL = ("calibration.samples=8", "evaluation.tokens=1024", "evaluation.seq_len=512", "tracking=none")
"""Little: a processor without instructions for bfloat16 takes ten times as long."""
MEMORY = 2.5e9
PROGRAM = """
import sys
from pathlib import Path
from wrapq.cli import main
try:
    main(sys.argv[1:])
finally:
    print(Path("/proc/self/status").read_text())
"""
"""wrapq, which says at the end what it took; what the kernel says of a child holds what its parent took before."""


class Reached(NamedTuple):
    """What a run in a process of its own left: its exit status, its figures, what it said, the most memory it took."""

    status: int
    float_perplexity: float
    kl: float
    top1: float
    megabytes: float
    said: str
    peak: int


def run(model: Path, outputs: Path, recipe: str, *overrides: str) -> Reached:
    words = [
        "run",
        f"recipe={recipe}",
        "model=hf",
        f"model.path={model}",
        f"paths.outputs={outputs}",
        *SMALL,
        *overrides,
    ]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    folders = sorted(outputs.glob("*/*/run.json"))
    assert folders, text
    facts: dict[str, Any] = json.loads(folders[-1].read_text())
    stages, size = facts["stages"], facts["sizes"]["quantized"] / 1e6
    quantized = stages["quantized"]
    peak = next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM:")), 0)
    figures = stages["float"]["perplexity"], quantized["kl"], quantized["top1_agreement"], size
    return Reached(done.returncode, *figures, text, peak)


@pytest.mark.parametrize(
    ("recipe", "kl", "megabytes"),
    [
        ("w4a16_gptq", 0.6, 400),
        ("w4a4_rotated_gptq", 1.2, 400),
    ],
)
def test_what_recipes_keep_of_it(
    recipe: str, kl: float, megabytes: float, real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    reached = run(real_model("gemma3-270m"), tmp_path / "out", recipe)
    assert reached.status == 0, reached.said
    assert 10 < reached.float_perplexity < 25, "every sequence begins as the tokenizer has it"
    assert reached.kl < kl and reached.megabytes < megabytes
    assert 0 < reached.peak < MEMORY, f"{reached.peak / 1e9:.2f} GB"


def test_embedding_and_head_in_8_bits(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    reached = run(real_model("gemma3-270m"), tmp_path / "out", "w4a16_w8_embedding")
    assert reached.status == 0, reached.said
    assert reached.kl < 0.65 and reached.megabytes < 230
    assert 0 < reached.peak < MEMORY, f"{reached.peak / 1e9:.2f} GB"


def test_every_point_quantized_after_rotations(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    """The logits are a point too, and those of one batch take half a gigabyte."""
    few = "calibration.samples=4", "evaluation.tokens=512"
    reached = run(real_model("gemma3-270m"), tmp_path / "out", "npu_w4a16_spinquant_gptq", *few)
    assert reached.status == 0, reached.said
    assert reached.megabytes < 230
    assert 0 < reached.peak < MEMORY, f"{reached.peak / 1e9:.2f} GB"


def test_what_ruins_it_is_said(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    down = '+rules.down={match: {name: "*.mlp.down_proj"}, input: int3:tensor}'
    reached = run(real_model("gemma3-270m"), tmp_path / "out", "w8a8_static", down, "evaluation.tokens=512")
    said = " ".join(reached.said.split())
    assert reached.status == 12 and math.isfinite(reached.kl), said
    named = re.search(r"with one kind of point in float: (\S+) ", said)
    assert named and named[1] == "model.layers.*.mlp.down_proj.input"


def test_llama_cpp_runs_it(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Its own norms, windows and tokenizer, as float: what llama.cpp computes is what transformers does."""
    pytest.importorskip("llama_cpp", reason="pip install 'wrapq[gguf]' compiles llama.cpp, which takes minutes")
    folder = real_model("gemma3-270m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("The file is read line by line, and each of them", return_tensors="pt")["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    write_gguf(model, tokenizer, tmp_path / MODEL, "gemma", torch.bfloat16)
    reading = Gguf().read(tmp_path, ids, "cpu")
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    assert (reading.logits - expected).norm() <= 1e-2 * expected.norm()
    assert reading.tokens is not None
    assert reading.tokens[0, :8].tolist() == greedy(model, ids.numpy(), 8)[0].tolist()
