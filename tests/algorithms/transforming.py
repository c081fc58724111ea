"""Running transforms on a model in memory, as a run does."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wrapq.algorithms.transform import Targets, Transform
from wrapq.calibration.processes import Processes
from wrapq.engine.apply_transforms import apply_transform
from wrapq.graph.blocks import Batch
from wrapq.graph.dataflow import Graph, find_graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.model import Specs


def smooth_specs(graph: Graph, weight: str = "int8:channel", given: str | None = "int8:tensor:asym") -> Specs:
    """Specs for every linear of the blocks."""
    points = {"weight": QuantSpec.parse(weight)} | ({} if given is None else {"input": QuantSpec.parse(given)})
    return {name: points for name in graph.linears if re.search(r"\.(layers?|h)\.", name)}


@torch.no_grad()
def outputs_moved(
    model: nn.Module, transforms: Sequence[Transform], batches: Sequence[Tensor], weight: str = "int8:channel"
) -> tuple[float, list[Targets]]:
    """How far the outputs moved, relative to their norm, and what each transform found."""
    graph = find_graph(model)
    rewriter = GraphRewriter(model, graph, smooth_specs(graph, weight))
    before = model(batches[0]).logits.double()
    found = []
    for transform in transforms:
        found.append(transform.find_targets(rewriter.graph, rewriter.specs))
        apply_transform(
            rewriter, transform, found[-1].names, [Batch({"input_ids": ids}) for ids in batches], Processes()
        )
        rewriter.undo_log.commit()
    return float((model(batches[0]).logits - before).norm() / before.norm()), found
