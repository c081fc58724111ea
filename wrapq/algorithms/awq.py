"""AWQ: weight columns that multiply large inputs are scaled up before rounding, which gives them a finer grid.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv:2306.00978, equation
5: the scales are `s = mean|x|^a`, and `a` is searched for the least error of `Q(W s) (x / s)` against `W x`. Here that
error is `tr(D H D^T)` with `D = Q(W s) / s - W` and `H = X^T X`, the same number without running the model again.
`replay` compares the best of them by the error in the output of their block, as the paper's code compares all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from wrapq.algorithms.base import ALGORITHMS
from wrapq.algorithms.block_outputs import BlockOutputs
from wrapq.algorithms.scaling import (
    largest_per_channel,
    own_consumers,
    quantized_linears,
    round_scaled,
    safe_factors,
    scaled_error,
    unscalable,
    with_own_inputs,
)
from wrapq.algorithms.transform import BATCHES, Statistics, Targets, Transform
from wrapq.graph.dataflow import OWN_INPUT, ChannelEdge, Graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.quant.spec import QuantSpec
from wrapq.registry import Options
from wrapq.wrappers.model import Specs


class AWQOptions(Options):
    """Options of `awq`."""

    grid: int = Field(20, ge=1, description="How many exponents between 0 and 1 are tried.")
    duo: bool = Field(True, description="Try scales that take the weights' own magnitudes into account, too.")
    online: bool = Field(
        False, description="Divide a layer's own input, at each forward, where nothing before it takes the inverse."
    )
    replay: int = Field(
        0, ge=0, description="So many of the best are compared again, by running their block on one batch with each."
    )


@ALGORITHMS.register("awq")
class AWQ(Transform):
    """Scales the inputs of linears with quantized weights, wherever their producer can take the inverse. Clipping, the
    paper's second step, is a choice of ranges: `seqmse`, or `gptq` with `ranges: hessian`, after it."""

    Options = AWQOptions
    options: AWQOptions
    migrates = True
    offline = "online=false"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hessian", "mean_abs", *((BATCHES,) if self.options.replay else ()))

    def find_targets(self, graph: Graph, specs: Specs) -> Targets:
        reasons = {edge.producer: unscalable(edge, graph) for edge in graph.edges}
        for edge in graph.edges:
            if not any(c.layer.kind == "linear" and "weight" in specs.get(c.module, {}) for c in edge.consumers):
                reasons[edge.producer] = "no linear that reads it has a quantized weight"
        if self.options.online:
            reasons = with_own_inputs(reasons, graph, specs, "weight")
        return Targets.where_none(reasons)

    def online(self, graph: Graph, targets: Sequence[str]) -> tuple[str, ...]:
        return own_consumers(graph, targets)

    def apply(self, rewriter: GraphRewriter, target: str, statistics: Statistics) -> Mapping[str, float]:
        edge = rewriter.graph.edge(target)
        tried = [torch.ones(edge.width), *self.candidates(rewriter, edge, statistics)]
        errors = [awq_error(rewriter, edge, factors, statistics) for factors in tried]
        order, figures = sorted(range(len(tried)), key=errors.__getitem__), {}
        best = order[0]
        if self.options.replay:
            block = BlockOutputs(rewriter, [consumer.module for consumer in edge.consumers])
            rerun = {i: block_error(rewriter, edge, block, tried[i]) for i in {0, *order[: self.options.replay]}}
            best = min(rerun, key=rerun.__getitem__)
            figures["block_error"] = rerun[best] / rerun[0] if rerun[0] else 1.0
        if best or edge.layer is not OWN_INPUT:
            rewriter.scale(edge, tried[best])
        figures["error"] = errors[best] / errors[0] if errors[0] else 1.0
        return figures | {"largest_factor": float(tried[best].amax())}

    def candidates(self, rewriter: GraphRewriter, edge: ChannelEdge, statistics: Statistics) -> Iterator[Tensor]:
        """The scales [N] that are tried, besides none."""
        most = max(stats.rows for stats in statistics.values())  # of a mixture its router's: it gets all tokens
        inputs = {name: stats.get("mean_abs", name) for name, stats in statistics.items() if stats.rows == most}
        x = largest_per_channel(edge, inputs)
        magnitudes = [(c, relative_magnitude(weight, spec)) for c, weight, spec in quantized_linears(rewriter, edge)]
        w = torch.stack([c.reduce_max(magnitude.cpu(), edge.width) for c, magnitude in magnitudes]).mean(0)
        for step in range(self.options.grid):
            ratio = step / self.options.grid
            yield centred(x**ratio, edge)
            if self.options.duo:
                yield centred(x**ratio / (w ** (1 - ratio) + 1e-4), edge)


def centred(factors: Tensor, edge: ChannelEdge) -> Tensor:
    """`factors` [N] divided by the geometric mean of the largest and the smallest; 1 where there are none."""
    own = factors[edge.owned].clamp(min=1e-4)
    return safe_factors(factors.clamp(min=1e-4) / (own.amax() * own.amin()).sqrt(), edge)


def relative_magnitude(weight: Tensor, spec: QuantSpec) -> Tensor:
    """The mean magnitude of each column [K] of a weight [N, K], relative to the largest element that shares a scale."""
    size = spec.group_size if spec.granularity == "group" else weight.shape[1]
    parts = weight.abs().unflatten(1, (-1, size or 1))
    return (parts / parts.amax(-1, keepdim=True).clamp(min=1e-6)).flatten(1).mean(0)


def awq_error(rewriter: GraphRewriter, edge: ChannelEdge, factors: Tensor, statistics: Statistics) -> float:
    """The squared error in the outputs of all consumers of `edge` with quantized weights, summed over the calibration
    rows of each, for scales `factors` [N]."""
    total = 0.0
    for consumer, weight, spec in quantized_linears(rewriter, edge):
        if (stats := statistics.get(consumer.module)) is not None:
            hessian, scales = stats.get("hessian", consumer.module), consumer.expand(factors).to(weight.device)
            total += scaled_error(weight, scales, spec, hessian, consumer.module)
    return total


def block_error(rewriter: GraphRewriter, edge: ChannelEdge, block: BlockOutputs, factors: Tensor) -> float:
    """The squared error in the output of the block, for scales `factors` [N]."""
    weights = {}
    for consumer, weight, spec in quantized_linears(rewriter, edge):
        rounded = round_scaled(weight, consumer.expand(factors).to(weight.device), spec, consumer.module)
        dtype = rewriter.model.get_submodule(consumer.module).get_parameter("weight").dtype
        as_held = rounded if consumer.layout.in_axis == 1 else rounded.t()
        weights[f"{consumer.module}.weight"] = as_held.to(dtype)
    return block.error(weights)
