"""What eight weight-only recipes cost on one store, as a multiple of one: 2, 3, 4 and 8 bits, symmetric and asymmetric.

    python tests/bench/bench_sweep.py [--threads 1] [--samples 64]

The model of `bench_gptq.py`, GPTQ in groups of 128, the schedule `parallel`, whose statistics all recipes share. One
recipe without a store, then the eight with one, of which the first gathers for all, then the first of them again, which
reads all statistics: CPU seconds of the walks, model and data in memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tests.bench.bench_gptq import cpu_seconds, make_model
from wrapq.algorithms.gptq import GPTQ
from wrapq.calibration.assignments import Assignments
from wrapq.calibration.walker import Walker, WalkOptions
from wrapq.graph.blocks import Batch
from wrapq.large_pages import use_large_pages
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.cache import StatisticsCache
from wrapq.statistics.store import Store
from wrapq.wrappers.model import wrap_model

SPECS = [f"{kind}{bits}:g128:{how}" for bits in (2, 3, 4, 8) for kind, how in (("int", "sym"), ("uint", "asym"))]


def walk_seconds(spec: str, tokens: Tensor, store: Store | None) -> float:
    """CPU seconds of one recipe's walk."""
    model = make_model()
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    wrapped = wrap_model(model, {name: {"weight": QuantSpec.parse(spec)} for name in names})
    options = WalkOptions(cache=StatisticsCache(store, {"model": "bench"}) if store else None)
    walker = Walker(wrapped, Assignments({f"{name}.weight": GPTQ() for name in names}), options)
    return cpu_seconds(
        lambda: walker.run([Batch({"input_ids": b, "use_cache": False}) for b in tokens.split(2)], "parallel")
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tokens = torch.randint(3, 4096, (given.samples, 512), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), 1e10)
        one = walk_seconds(SPECS[0], tokens, None)
        swept = {spec: walk_seconds(spec, tokens, store) for spec in SPECS}
        warm = walk_seconds(SPECS[0], tokens, store)
    seconds = {"one": one, **swept, "warm": warm}
    print(json.dumps({name: round(value, 1) for name, value in seconds.items()}, indent=1))
    print(f"eight / one: {sum(swept.values()) / one:.2f}, warm / cold: {warm / one:.2f}")


if __name__ == "__main__":
    use_large_pages()  # as the command line does
    main()
