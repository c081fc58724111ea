"""What each stage of a stack costs, as a multiple of one forward over the calibration tokens, in one run.

    python -m tests.bench.bench_stages [--threads 1] [--samples 64] [--stages 'awq;gptq']

The random-init Llama of `bench_gptq.py`, W4 group 128 (with 8-bit inputs where a stage asks for them), 64 x 512 tokens,
float32, schedule `sequential`. CPU seconds of `wrapq.calibrate` with that stage, all forwards of its own included.
Ends with an error where a stage that does not learn takes more than ten forwards.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import wrapq
from tests.bench.bench_gptq import cpu_seconds, make_model
from tests.bench.bench_runtime import FLOAT

WEIGHT, INPUT = "int4:g128:asym", "int8:token:dyn"
ROUND: Mapping[str, Any] = {"round": "rtn"}
STAGES: dict[str, Mapping[str, Any]] = {
    "fold_norms": {"fold": "fold_norms", **ROUND},
    "fold_norms, rotate R1 R2": {"fold": "fold_norms", "turn": "rotate", **ROUND},
    "rotate R4": {"turn": {"algorithm": "rotate", "rotations": ["R4"]}, **ROUND},
    "smoothquant": {"smooth": "smoothquant", **ROUND},
    "smoothquant, search": {"smooth": {"algorithm": "smoothquant", "alpha": "search"}, **ROUND},
    "awq": {"scale": "awq", **ROUND},
    "cle": {"equal": "cle", **ROUND},
    "magr": {"magr": "magr", **ROUND},
    "rtn": ROUND,
    "hqq": {"round": "hqq"},
    "seqmse": {"round": "seqmse"},
    "gptq": {"round": "gptq"},
    "gptq, asymmetric": {"round": {"algorithm": "gptq", "asymmetric": 0.5}},
    "bias_correction": {**ROUND, "bias": "bias_correction"},
    "bias_correction, empirical": {**ROUND, "bias": {"algorithm": "bias_correction", "empirical": True}},
    "low_rank": {**ROUND, "repair": "low_rank"},
    "adaround": {"round": "adaround"},
    "autoround": {"round": "autoround"},
}
GRADIENT = ("adaround", "autoround")
"""Stages that learn, which may take as long as they do."""


def prepared(inputs: bool) -> torch.nn.Module:
    points = {"weight": WEIGHT} | ({"input": INPUT} if inputs else {})
    return wrapq.prepare(make_model(), wrapq.PTQConfig(WEIGHT, None, {**FLOAT, "*_proj": points}))


def stage_seconds(stack: Mapping[str, Any], batches: list[Tensor], inputs: bool) -> float:
    """CPU seconds of one calibration."""
    model = prepared(inputs)
    return cpu_seconds(lambda: wrapq.calibrate(model, batches, stack=stack))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--stages", default=";".join(name for name in STAGES if name not in GRADIENT))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tokens = torch.randint(3, 4096, (given.samples, 512), generator=torch.Generator().manual_seed(0))
    batches, model = list(tokens.split(2)), make_model()
    model(batches[0])
    forward = cpu_seconds(lambda: [model(ids, use_cache=False) for ids in batches])
    print(f"{'one forward':28}{forward:8.1f} CPU s", flush=True)
    ratios = {}
    for name in given.stages.split(";"):
        seconds = stage_seconds(STAGES[name], batches, "smooth" in name)
        ratios[name] = seconds / forward
        print(f"{name:28}{seconds:8.1f} CPU s{ratios[name]:8.2f} forwards", flush=True)
    print(json.dumps({name: round(ratio, 2) for name, ratio in ratios.items()}))
    slow = [name for name, ratio in ratios.items() if ratio > 10 and name not in GRADIENT]
    raise SystemExit(f"above ten forwards: {', '.join(slow)}" if slow else 0)


if __name__ == "__main__":
    main()
