"""Gemma 3 270M, bf16, of 262,144 words and with norms that write into its stream: what shipped recipes keep of it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]
SMALL = ("calibration.samples=32", "evaluation.tokens=4096", "evaluation.seq_len=512", "tracking=none")
MEMORY = 2.5 * 2**30


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
    said = outputs.with_suffix(".txt")
    with said.open("w") as stream:
        process = subprocess.Popen([sys.executable, "-m", "wrapq", *words], stdout=stream, stderr=subprocess.STDOUT)
        _, waited, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(waited)
    text = said.read_text()
    folders = sorted(outputs.glob("*/*/run.json"))
    assert folders, text
    facts: dict[str, Any] = json.loads(folders[-1].read_text())
    stages, size = facts["stages"], facts["sizes"]["quantized"] / 1e6
    quantized = stages["quantized"]
    peak = usage.ru_maxrss * 1024
    figures = stages["float"]["perplexity"], quantized["kl"], quantized["top1_agreement"], size
    return Reached(process.returncode, *figures, text, peak)


@pytest.mark.parametrize(
    ("recipe", "kl", "megabytes"),
    [
        ("w8a8_dynamic", 0.08, 440),
        ("w4a16_gptq", 0.5, 400),
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
    assert reached.peak < MEMORY, f"{reached.peak / 1e9:.2f} GB"


def test_embedding_and_head_in_8_bits(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    reached = run(real_model("gemma3-270m"), tmp_path / "out", "w4a16_w8_embedding")
    assert reached.status == 0, reached.said
    assert reached.kl < 0.55 and reached.megabytes < 230


def test_what_ruins_it_is_said(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    down = '+rules.down={match: {name: "*.mlp.down_proj"}, input: int3:tensor}'
    static = "calibration.samples=8", "evaluation.tokens=1024"
    reached = run(real_model("gemma3-270m"), tmp_path / "out", "w8a8_static", down, *static)
    said = " ".join(reached.said.split())
    assert reached.status == 12 and math.isfinite(reached.kl), said
    named = re.search(r"with one kind of point in float: (\S+) ", said)
    assert named and named[1] == "model.layers.*.mlp.down_proj.input"
