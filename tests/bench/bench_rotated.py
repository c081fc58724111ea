"""How much of a small model is lost with 4-bit weights and inputs, rotated, beside llm-compressor's SpinQuant and GPTQ.

    python -m tests.bench.bench_rotated [--models demo,PATH] [--seeds 3]

Weights int4 by channel, symmetric, rounded by GPTQ with damping 0.01; inputs int4 by token, dynamic; embeddings, norms
and lm_head float. KL(float || quantized) and perplexity as in `bench_accuracy.py`, whose text and sizes these are. Each
seed draws other calibration text and other signs of the Hadamard matrices.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

import wrapq
from tests.bench.bench_accuracy import BATCH, DAMP, EVALUATED, LENGTH, SAMPLES, Case, case, parser
from tests.bench.bench_runtime import FLOAT
from tests.peers.environment import peer_python, run_oneshots
from wrapq.evaluation.quality import QualityMeter

WEIGHT, INPUT = "int4:channel:sym", "int4:token:sym:dyn"
ROTATIONS = {"plain": (), "R1 R2": ("R1", "R2"), "R1 R2 R4": ("R1", "R2", "R4")}


def ours(case: Case, rotations: tuple[str, ...], seed: int, ids: Tensor, evaluated: Tensor) -> Tensor:
    config = wrapq.PTQConfig(WEIGHT, None, {**FLOAT, "*_proj": {"weight": WEIGHT, "input": INPUT}})
    model = wrapq.prepare(case.load(), config)
    turn = {"algorithm": "rotate", "rotations": rotations, "seed": seed}
    fold = {"algorithm": "fold_norms", "untie": True}
    stack = {"fold": fold, "turn": turn} if rotations else {}
    wrapq.calibrate(model, list(ids.split(BATCH)), stack={**stack, "round": {"algorithm": "gptq", "damp": DAMP}})
    model = wrapq.convert(model)
    return torch.cat([model(input_ids=part, use_cache=False).logits for part in evaluated.split(BATCH)])


def job(case: Case, rotations: tuple[str, ...], tokens: Path, evaluated: Path, out: Path) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 4, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    rounding = {"ignore": ["lm_head"], "config_groups": {"group_0": group}, "dampening_frac": DAMP}
    turn = {"rotations": list(rotations), "transform_type": "random-hadamard"}
    modifiers = ({"SpinQuantModifier": turn} if rotations else {}) | {"GPTQModifier": rounding}
    recipe = json.dumps({"s_stage": {"m_modifiers": modifiers}})
    files = {"tokens": str(tokens), "logits": str(evaluated), "out": str(out)}
    return {"model": str(case.folder), "dtype": "float32", "recipe": recipe, "batch_size": BATCH, **files}


def measure(case: Case, seed: int, python: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each project and set of rotations."""
    ids = case.tokens(case.calibration, SAMPLES, seed)
    evaluated = case.tokens(case.evaluation, EVALUATED // LENGTH, None)
    model = case.load()
    reference = torch.cat([model(input_ids=part, use_cache=False).logits for part in evaluated.split(BATCH)])

    def row(project: str, name: str, logits: Tensor) -> dict[str, Any]:
        meter = QualityMeter()
        meter.update(reference, logits, evaluated)
        return {"model": case.name, "seed": seed, "by": project, "rotations": name} | meter.result()

    for name, rotations in ROTATIONS.items():
        yield row("wrapq", name, ours(case, rotations, seed, ids, evaluated))
    files = {"tokens": ids, "evaluated": evaluated}
    for name, tensor in files.items():
        save_file({"ids": tensor.contiguous()}, folder / f"{name}.safetensors")
    paths = [folder / f"{name}.safetensors" for name in files]
    jobs = {str(folder / name): (name, rotations) for name, rotations in ROTATIONS.items()}
    asked = [job(case, rotations, *paths, Path(out)) for out, (_, rotations) in jobs.items()]
    for answer in run_oneshots(python, asked, folder):
        name = jobs[answer["out"]][0]
        if "error" in answer:
            failed = {"by": "llm-compressor", "rotations": name, "error": answer["error"]}
            yield {"model": case.name, "seed": seed} | failed
        else:
            yield row("llm-compressor", name, load_file(Path(answer["out"]) / "logits.safetensors")["logits"])


@torch.no_grad()
def main() -> None:
    given = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        python = peer_python(Path(scratch, "peer"))
        for name in given.models.split(","):
            for seed in range(given.seeds):
                folder = Path(scratch, f"{case(name).name}-{seed}")
                folder.mkdir()
                for row in measure(case(name), seed, python, folder):
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    print("| model | rotations | by | n | KL | sd | perplexity |\n|---|---|---|---|---|---|---|")
    for key in dict.fromkeys((row["model"], row["rotations"], row["by"]) for row in rows):
        found = [r for r in rows if (r["model"], r["rotations"], r["by"]) == key and "kl" in r]
        kl, perplexity = [r["kl"] for r in found], [r["perplexity"] for r in found]
        spread = statistics.stdev(kl) if len(kl) > 1 else 0.0
        mean = f"{statistics.mean(kl):.5f} | {spread:.5f} | {statistics.mean(perplexity):.3f}" if kl else "failed | |"
        print(f"| {' | '.join(key)} | {len(found)} | {mean} |")


if __name__ == "__main__":
    main()
