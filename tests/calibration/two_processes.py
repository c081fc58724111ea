"""Walks a small model in one of several processes and writes down what it decided; started by test_processes.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.algorithms.transforming import smooth_specs
from tests.calibration.conftest import as_batches, decided, gptq_walker
from tests.calibration.test_walker import Mixture, expert_batches
from tests.conftest import build_model
from wrapq import PTQConfig, prepare
from wrapq.algorithms.awq import AWQ
from wrapq.algorithms.gptq import GPTQ, GPTQOptions
from wrapq.calibration.processes import Processes
from wrapq.engine.apply_transforms import apply_transform
from wrapq.graph.blocks import Batch
from wrapq.graph.dataflow import find_graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.wrappers.experts import take_apart


def walk(processes: Processes, schedule: str) -> dict[str, object]:
    config = PTQConfig(weight="int8:channel:sym", activations="uint8:tensor:asym")
    llama = prepare(build_model("llama"), config)
    tokens = list(torch.randint(3, 96, (5, 2, 12), generator=torch.Generator().manual_seed(1)))
    # in float64 the order of summation moves no code to its neighbour, so that all that comes after can be compared
    rounder = GPTQ(GPTQOptions(precision="float64"))
    walker = gptq_walker(llama, rounder, processes=processes)
    walker.run(as_batches(tokens), schedule)
    torch.manual_seed(0)
    mixture = prepare(Mixture(), config)
    mixed = gptq_walker(mixture, rounder, processes=processes)
    mixed.run(expert_batches((0,), (0, 1), (2,)), schedule)  # expert 1 is reached in one process only
    few = [Batch({"input_ids": ids}) for ids in torch.arange(3, 12).reshape(3, 1, 3)]
    mixtral = prepare(build_model("mixtral"), PTQConfig("int8:channel:sym", None))
    experts = gptq_walker(mixtral, rounder, processes=processes)
    experts.run(few, schedule)  # some of them, whose first two weights share an input, are reached in one process only
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv1d(4, 12, 3, groups=4), torch.nn.ReLU(), torch.nn.Conv1d(12, 12, 5, groups=12)
    )
    convolutions = gptq_walker(prepare(net, PTQConfig("int8:channel:sym", None)), rounder, processes=processes)
    convolutions.run([Batch({"input": torch.randn(2, 4, 40)}) for _ in range(5)], schedule)
    statistics = {name: tensor.tolist() for name, tensor in walker.result.statistics.items()}
    return {
        "llama": decided(llama),
        "mixture": decided(mixture),
        "statistics": statistics,
        "convolutions": decided(convolutions.model),
        "convolved": convolutions.result.reports,
        "experts": decided(experts.model),
        "rows": {where: report.get("rows") for where, report in experts.result.reports.items()},
        "reports": walker.result.reports,
        "text": processes.text_of_first(f"said by {processes.rank}"),
    }


def scale(processes: Processes) -> dict[str, object]:
    """AWQ on experts, some of which are reached in one process only."""
    scaled = take_apart(build_model("mixtral"))
    graph = find_graph(scaled)
    rewriter = GraphRewriter(scaled, graph, smooth_specs(graph, "int4:g16:sym", None))
    awq, few = AWQ(), [Batch({"input_ids": ids}) for ids in torch.arange(3, 12).reshape(3, 1, 3)]
    walked = apply_transform(rewriter, awq, awq.find_targets(graph, rewriter.specs).names, few, processes)
    return {"scaled": {target: dict(figures) for target, figures in walked.items()}, "unreached": rewriter.notes}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    processes = Processes.from_environment()
    with processes.joined(torch.device("cpu")):
        found = {schedule: walk(processes, schedule) for schedule in ("sequential", "parallel")}
        found["transform"] = scale(processes)
    (folder / f"{processes.rank}-of-{processes.count}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
