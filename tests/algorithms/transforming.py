"""Running transforms on a model in memory, as a run does."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wrapq.calibration.algorithm import Found, Transform
from wrapq.calibration.forward import Batch
from wrapq.calibration.graph import Graph, find_graph
from wrapq.calibration.processes import Processes
from wrapq.calibration.surgery import Surgeon
from wrapq.engine.transform import walk
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.model import Specs


def smooth_specs(graph: Graph, weight: str = "int8:channel", given: str | None = "int8:tensor:asym") -> Specs:
    """Specs for every linear of the blocks."""
    points = {"weight": QuantSpec.parse(weight)} | ({} if given is None else {"input": QuantSpec.parse(given)})
    return {name: points for name in graph.linears if re.search(r"\.(layers?|h)\.", name)}


@torch.no_grad()
def outputs_moved(
    model: nn.Module, transforms: Sequence[Transform], batches: Sequence[Tensor], weight: str = "int8:channel"
) -> tuple[float, list[Found]]:
    """How far the outputs moved, relative to their norm, and what each transform found."""
    graph = find_graph(model)
    surgeon = Surgeon(model, graph, smooth_specs(graph, weight))
    before = model(batches[0]).logits.double()
    found = []
    for transform in transforms:
        found.append(transform.find(graph, surgeon.specs))
        walk(surgeon, transform, found[-1].targets, [Batch({"input_ids": ids}) for ids in batches], Processes())
        surgeon.commit()
    return float((model(batches[0]).logits - before).norm() / before.norm()), found
