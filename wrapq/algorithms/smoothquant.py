"""SmoothQuant: outlier channels of activations are scaled down and the weights that multiply them up.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438, equation 4: the channel j of a linear's input is divided, and column j of its weight multiplied, by
`s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from wrapq.algorithms.base import ALGORITHMS
from wrapq.algorithms.scaling import (
    largest_per_channel,
    quantized,
    quantized_linears,
    safe_factors,
    scaled_error,
    unscalable,
)
from wrapq.algorithms.transform import Statistics, Targets, Transform
from wrapq.graph.dataflow import ChannelEdge, Graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.quant.spec import QuantSpec
from wrapq.registry import Options
from wrapq.wrappers.model import Specs

_GRID = tuple(step / 20 for step in range(21))


class SmoothQuantOptions(Options):
    """Options of `smoothquant`."""

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = Field(
        0.5, description="How much moves into the weights; `search` takes the least error for each input, of 21 values."
    )
    feeds: Literal["norms", "all"] = Field(
        "norms", description="Scale what norms give, as the paper does, or also what attention and products give."
    )


@ALGORITHMS.register("smoothquant")
class SmoothQuant(Transform):
    """Smooths quantized inputs whose producer is a norm, or any layer that can take the inverse."""

    Options = SmoothQuantOptions
    options: SmoothQuantOptions
    migrates = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("absmax", "hessian") if self.options.alpha == "search" else ("absmax",)

    def find_targets(self, graph: Graph, specs: Specs) -> Targets:
        edges = [edge for edge in graph.edges if self.options.feeds == "all" or edge.layer.kind == "norm"]
        unread = "no input of what reads it is quantized"
        reasons = {e.producer: unscalable(e, graph) if quantized(e, specs, "input") else unread for e in edges}
        return Targets.where_none(reasons)

    def apply(self, rewriter: GraphRewriter, target: str, statistics: Statistics) -> Mapping[str, float]:
        edge = rewriter.graph.by_producer[target]
        x = largest_per_channel(edge, {name: stats.get("absmax", name) for name, stats in statistics.items()})
        w = largest_per_channel(edge, {c.module: rewriter.consumer_weight(c).abs().amax(0) for c in edge.consumers})
        if self.options.alpha == "search":
            errors = {a: smoothed_error(rewriter, edge, smoothing(x, w, a, edge), statistics) for a in _GRID}
            alpha = min(errors, key=errors.__getitem__)
        else:
            alpha = self.options.alpha
        factors = smoothing(x, w, alpha, edge)
        rewriter.scale(edge, factors)
        return {"alpha": alpha, "largest_factor": float(factors.amax()), "smallest_factor": float(factors.amin())}


def smoothing(x: Tensor, w: Tensor, alpha: float, edge: ChannelEdge) -> Tensor:
    """Equation 4 for the largest inputs `x` [N] and weights `w` [N]; 1 for channels of zeros."""
    return safe_factors(x**alpha / w ** (1 - alpha), edge)


def smoothed_error(rewriter: GraphRewriter, edge: ChannelEdge, factors: Tensor, statistics: Statistics) -> float:
    """The squared error in the outputs of the consumers of `edge` when their weights and inputs are quantized, summed.

    The weights' part is exact for float inputs; the inputs' part takes their rounding errors as independent and
    uniform, `step^2 / 12` each, or as large as the channel itself where that is less, multiplied by
    `sum_ij W_ij^2 s_j^2`. The relative errors of floating-point grids do not depend on the scale of a channel and are
    omitted.
    """
    total = 0.0
    for consumer, weight, spec in quantized_linears(rewriter, edge):
        if (stats := statistics.get(consumer.module)) is None:
            continue
        scales = consumer.expand(factors).to(weight.device)
        hessian = stats.get("hessian", consumer.module)
        total += scaled_error(weight, scales, spec, hessian, consumer.module)
        given = rewriter.specs[consumer.module].get("input")
        if given is not None and given.dtype.kind == "int":
            steps = input_steps(stats.get("absmax", consumer.module) / scales, given)
            lost = torch.minimum(steps.square() / 12 * stats.rows, hessian.diagonal() / scales.square())
            total += float((lost * (weight * scales).square().sum(0)).sum())
    return total


def input_steps(largest: Tensor, spec: QuantSpec) -> Tensor:
    """The step [K] of each channel of an input whose `largest` magnitudes [K] are known: of the whole tensor unless
    channels or groups of them have scales of their own."""
    size = {"channel": 1, "group": spec.group_size or 1}.get(spec.granularity, len(largest))
    return largest.unflatten(0, (-1, size)).amax(1).repeat_interleave(size) / spec.dtype.half_range
