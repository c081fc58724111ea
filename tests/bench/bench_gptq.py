"""What GPTQ costs: CPU seconds and memory against the floor that the machine's own matrix rate sets, in one run.

    python tests/bench/bench_gptq.py [--threads 1] [--samples 64] [--length 512] [--offload-gb 0.43]

A random-init Llama (hidden 512, intermediate 1408, 8 layers, 8 heads, 4 key-value heads, vocabulary 4096), W4 group
128, float32. The floor is one forward of the blocks, measured, one Hessian for each distinct input of a block and the
solves, at the rate of a large matrix product measured before and after. What waiting batches hold beyond
`--offload-gb` waits on disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wrapq.algorithms.gptq import GPTQ
from wrapq.calibration.assignments import Assignments
from wrapq.calibration.offload import Offload
from wrapq.calibration.walker import Walker, WalkOptions
from wrapq.graph.blocks import Batch
from wrapq.large_pages import use_large_pages
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.model import wrap_model

HIDDEN, INTERMEDIATE, LAYERS = 512, 1408, 8


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def cpu_seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def matrix_rate() -> float:
    """FLOP per CPU second of a 2048 x 2048 product in float32."""
    a = torch.randn(2048, 2048)
    a @ a
    return 8 * 2 * 2048**3 / cpu_seconds(lambda: [a @ a for _ in range(8)])


def floor_seconds(model: LlamaForCausalLM, tokens: torch.Tensor, batch: int, rate: float) -> dict[str, float]:
    """One forward of the blocks; `2 M K^2` for each distinct input; `K^3` to factorize and `2 N K^2` to solve."""
    part = tokens[: max(batch, len(tokens) // 8)]
    forward = cpu_seconds(
        lambda: [model.model(part[i : i + batch], use_cache=False) for i in range(0, len(part), batch)]
    )
    inputs = (HIDDEN, HIDDEN, HIDDEN, INTERMEDIATE)
    shapes = (
        [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN // 2, HIDDEN)] * 2 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]
    )
    hessians = LAYERS * sum(2 * tokens.numel() * k * k for k in inputs) / rate
    solves = LAYERS * (sum(k**3 for k in inputs) + sum(2 * n * k * k for n, k in shapes)) / rate
    return {"forward": forward * len(tokens) / len(part), "hessians": hessians, "solves": solves}


@torch.no_grad()
def measure(threads: int, samples: int, length: int, batch: int, offload_gb: float) -> dict[str, object]:
    torch.set_num_threads(threads)
    model = make_model()
    tokens = torch.randint(3, 4096, (samples, length), generator=torch.Generator().manual_seed(0))
    rates = [matrix_rate()]
    floor = floor_seconds(model, tokens, batch, rates[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    wrapped = wrap_model(model, {name: {"weight": QuantSpec.parse("int4:g128:sym")} for name in names})
    assignments = Assignments({f"{name}.weight": GPTQ() for name in names})
    batches = [Batch({"input_ids": tokens[i : i + batch], "use_cache": False}) for i in range(0, samples, batch)]
    with tempfile.TemporaryDirectory() as folder:
        offload = Offload(Path(folder), offload_gb * 1e9, wrapped)
        walker = Walker(wrapped, assignments, WalkOptions(offload=offload))
        seconds = cpu_seconds(lambda: walker.run(batches, "sequential"))
    rates.append(matrix_rate())
    errors = [report["output_error"] for report in walker.result.reports.values()]
    return {
        "threads": threads,
        "gflops": [round(rate / 1e9) for rate in rates],
        "cpu_seconds": round(seconds, 1),
        "floor": {name: round(value, 1) for name, value in floor.items()},
        "offloaded_gb": round(offload.written / 1e9, 2),
        "ratio_to_floor": round(seconds / sum(floor.values()), 2),
        "extra_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
        "mean_output_error": sum(errors) / len(errors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--offload-gb", type=float, default=0.43)
    given = parser.parse_args()
    print(json.dumps(measure(given.threads, given.samples, given.length, given.batch, given.offload_gb), indent=1))


if __name__ == "__main__":
    use_large_pages()  # as the command line does
    main()
