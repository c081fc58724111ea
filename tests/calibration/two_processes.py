"""Walks a small model in one of several processes and writes down what it decided; started by test_processes.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.calibration.conftest import as_batches, decided, gptq_walker
from tests.calibration.test_walker import Mixture, expert_batches
from tests.conftest import build_model
from wrapq import PTQConfig, prepare
from wrapq.algorithms.gptq import GPTQ, GPTQOptions
from wrapq.calibration.processes import Processes


def walk(processes: Processes, schedule: str) -> dict[str, object]:
    config = PTQConfig(weight="int8:channel:sym", activation="uint8:tensor:asym")
    llama = prepare(build_model("llama"), config)
    tokens = list(torch.randint(3, 96, (5, 2, 12), generator=torch.Generator().manual_seed(1)))
    # in float64 the order of summation moves no code to its neighbour, so that all that comes after can be compared
    rounder = GPTQ(GPTQOptions(precision="float64"))
    walker = gptq_walker(llama, rounder)
    walker.processes = processes
    walker.run(as_batches(tokens), schedule)
    torch.manual_seed(0)
    mixture = prepare(Mixture(), config)
    mixed = gptq_walker(mixture, rounder)
    mixed.processes = processes
    mixed.run(expert_batches((0,), (0, 1), (2,)), schedule)  # expert 1 is reached in one process only
    statistics = {name: tensor.tolist() for name, tensor in walker.statistics.items()}
    return {
        "llama": decided(llama),
        "mixture": decided(mixture),
        "statistics": statistics,
        "reports": walker.reports,
        "text": processes.said_by_first(f"said by {processes.rank}"),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    processes = Processes.from_environment()
    with processes.joined(torch.device("cpu")):
        found = {schedule: walk(processes, schedule) for schedule in ("sequential", "parallel")}
    (folder / f"{processes.rank}-of-{processes.count}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
