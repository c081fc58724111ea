"""SmoothQuant: outlier channels of activations are scaled down and the weights that multiply them up.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438, equation 4: the channel j of a linear's input is divided, and column j of its weight multiplied, by
`s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)`.

One alpha for all helps some layers and hurts others, more than it is worth in models without large outliers. So by
default each input gets the alpha with the least error in the outputs of the layers that read it, weights and inputs
rounded as they will be, over a sample of calibration rows; and is left alone where none is better than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from wrapq.algorithms.base import ALGORITHMS
from wrapq.algorithms.scaling import (
    largest_per_channel,
    own_consumers,
    quantized,
    round_scaled,
    safe_factors,
    unscalable,
    with_own_inputs,
)
from wrapq.algorithms.transform import Statistics, Targets, Transform
from wrapq.graph.dataflow import ChannelEdge, Graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.observers.base import make_observer
from wrapq.quant.affine import dynamic_fake_quantize
from wrapq.quant.spec import QuantSpec
from wrapq.registry import Options
from wrapq.wrappers.model import Specs

_GRID = tuple(step / 10 for step in range(11))
_PAPER = 0.5


class SmoothQuantOptions(Options):
    """Options of `smoothquant`."""

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = Field(
        "search", description="How much moves into the weights; `search` takes the least error for each input, or none."
    )
    feeds: Literal["norms", "all", "online"] = Field(
        "norms",
        description="Scale what norms give, as the paper does; or `all`, also what attention and products give; or "
        "`online`, also what nothing takes the factors of, by dividing the layer's own input at each forward.",
    )


@ALGORITHMS.register("smoothquant")
class SmoothQuant(Transform):
    """Smooths quantized inputs whose producer is a norm, or any layer that can take the inverse, or any at all."""

    Options = SmoothQuantOptions
    options: SmoothQuantOptions
    migrates = True
    offline = "feeds=all"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("absmax", "least", "greatest", "sample") if self.options.alpha == "search" else ("absmax",)

    def find_targets(self, graph: Graph, specs: Specs) -> Targets:
        edges = [edge for edge in graph.edges if self.options.feeds != "norms" or edge.layer.kind == "norm"]
        unread = "no input of what reads it is quantized"
        reasons = {e.producer: unscalable(e, graph) if quantized(e, specs, "input") else unread for e in edges}
        if self.options.feeds == "online":
            reasons = with_own_inputs(reasons, graph, specs, "input")
        return Targets.where_none(reasons)

    def online(self, graph: Graph, targets: Sequence[str]) -> tuple[str, ...]:
        return own_consumers(graph, targets)

    def apply(self, rewriter: GraphRewriter, target: str, statistics: Statistics) -> Mapping[str, float]:
        edge = rewriter.graph.edge(target)
        x = largest_per_channel(
            edge, {name: stats.get("absmax", f"{name}.input") for name, stats in statistics.items()}
        )
        w = largest_per_channel(edge, {c.module: rewriter.consumer_weight(c).abs().amax(0) for c in edge.consumers})
        alpha, figures = self.options.alpha, dict[str, float]()
        if alpha == "search":
            alpha, factors, figures["error"] = least_error(rewriter, edge, x, w, statistics)
        else:
            factors = smoothing(x, w, alpha, edge)
        if figures.get("error") != 1:  # else the place is left as it was
            rewriter.scale(edge, factors)
        return figures | {
            "alpha": alpha,
            "largest_factor": float(factors.amax()),
            "smallest_factor": float(factors.amin()),
        }


def smoothing(x: Tensor, w: Tensor, alpha: float, edge: ChannelEdge) -> Tensor:
    """Equation 4 for the largest inputs `x` [N] and weights `w` [N]; 1 for channels of zeros."""
    return safe_factors(x**alpha / w ** (1 - alpha), edge)


def least_error(
    rewriter: GraphRewriter, edge: ChannelEdge, x: Tensor, w: Tensor, statistics: Statistics
) -> tuple[float, Tensor, float]:
    """The alpha with the least `smoothed_error` for the largest inputs `x` [N] and weights `w` [N], its factors [N],
    and that error relative to the one without smoothing: 1, and factors of 1, where none is better. Where no error can
    be known, since convolutions alone read the edge, the paper's alpha, and an error of 0."""
    if not any(consumer.layer.kind == "linear" for consumer in edge.consumers):
        return _PAPER, smoothing(x, w, _PAPER, edge), 0.0
    left = torch.ones(edge.width)
    before = smoothed_error(rewriter, edge, left, statistics)
    best = 0.0, left, before
    for alpha in _GRID if before else ():
        factors = smoothing(x, w, alpha, edge)
        if (error := smoothed_error(rewriter, edge, factors, statistics)) < best[2]:
            best = alpha, factors, error
    return best[0], best[1], best[2] / before if before else 1.0


def smoothed_error(rewriter: GraphRewriter, edge: ChannelEdge, factors: Tensor, statistics: Statistics) -> float:
    """The squared error in the outputs of the linears that read `edge` when their weights and inputs are quantized as
    their specs say, summed over the calibration rows of each, of which it looks at a sample."""
    total = 0.0
    for consumer in edge.consumers:
        specs, where = rewriter.specs.get(consumer.module, {}), consumer.module
        if consumer.layer.kind != "linear" or not specs or (stats := statistics.get(where)) is None:
            continue
        weight = rewriter.consumer_weight(consumer)
        scales, sample = consumer.expand(factors).to(weight), stats.get("sample", where).to(weight)
        given, rounded = sample, weight
        if (spec := specs.get("weight")) is not None and not spec.dynamic:
            rounded = round_scaled(weight, scales, spec, f"{where}.weight")
        if (spec := specs.get("input")) is not None:
            extremes = torch.stack([stats.get(part, where).to(weight) for part in ("least", "greatest")])
            given = round_rows(sample / scales, extremes / scales, spec, f"{where}.input") * scales
        lost = (given @ rounded.t() - sample @ weight.t()).square().sum(dtype=torch.float64)
        total += float(lost) * stats.rows / len(sample)
    return total


def round_rows(sample: Tensor, extremes: Tensor, spec: QuantSpec, where: str) -> Tensor:
    """A sample [M, K] of the rows of an input, quantized in the range that its spec's observer finds; `extremes` [2, K]
    of all rows, which the sample need not hold, are shown to that as well. For an observer that looks at the outputs,
    which takes too long to be tried often, `mse` stands in."""
    if spec.dynamic:
        return dynamic_fake_quantize(sample, spec)
    observer = make_observer(spec)
    if observer.needs_consumer:
        observer = make_observer(replace(spec, observer="mse", observer_options=()))
    observer.update(torch.cat([sample, extremes]))
    return observer.qparams(where).fake_quantize(sample)
