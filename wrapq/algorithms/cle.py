"""Cross-layer equalization: each channel gets the same range in the weights that produce and that consume it.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv:1906.04721, equation 11:
for a channel whose largest weights are `r1` in the producer and `r2` in the consumers, `s = sqrt(r1 / r2)`, by which
the first is divided and the second multiplied. Along a chain of edges it is repeated until it converges. Batch norms
between are folded first, as in the paper; edges through a ReLU6, which the paper replaces by a ReLU, are skipped.

Section 4.1.3, absorbing high biases: a constant that a channel always exceeds passes the ReLU and moves into the next
bias. The paper takes three deviations below the mean that a batch norm tells; here it is the least value in the data.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field

from wrapq.algorithms.base import ALGORITHMS
from wrapq.algorithms.scaling import largest_per_channel, quantized, safe_factors, unscalable
from wrapq.algorithms.transform import Statistics, Targets, Transform
from wrapq.graph.dataflow import ChannelEdge, Graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.registry import Options
from wrapq.wrappers.model import Specs

_CONVERGED = 1e-3
_KINDS = ("linear", "conv")


class CLEOptions(Options):
    """Options of `cle`."""

    iterations: int = Field(20, ge=1, description="Most passes over weights that follow each other.")
    absorb: bool = Field(
        False, description="Move what channels behind a ReLU always exceed into the next bias; looks at data."
    )


@ALGORITHMS.register("cle")
class CLE(Transform):
    """Equalizes linears and convolutions that follow each other with a batch norm, a ReLU, attention, a product or
    nothing between; a target is the first of a chain."""

    Options = CLEOptions
    options: CLEOptions
    migrates = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("least",) if self.options.absorb else ()

    def find_targets(self, graph: Graph, specs: Specs) -> Targets:
        pairs = [edge for edge in graph.edges if edge.layer.kind in _KINDS]
        fit = Targets.where_none({edge.producer: _unfit(edge, graph, specs) for edge in pairs})
        later = {name for producer in fit.names for name in _next(graph, producer)}
        return fit._replace(names=tuple(name for name in fit.names if name not in later))

    def inputs(self, graph: Graph, target: str) -> tuple[str, ...]:
        return tuple(consumer.module for edge in _chain(graph, target) for consumer in edge.consumers)

    def apply(self, rewriter: GraphRewriter, target: str, statistics: Statistics) -> Mapping[str, float]:
        chain = [e for e in _chain(rewriter.graph, target) if _unfit(e, rewriter.graph, rewriter.specs) is None]
        for edge in chain:
            rewriter.fold_batch_norm(edge.norm)
        passes, largest = 0, 1.0
        absorbed = sum(absorb(rewriter, edge, statistics) for edge in chain) if self.options.absorb else 0
        for _ in range(self.options.iterations):
            moved = max(equalize(rewriter, edge) for edge in chain)
            passes += 1
            largest = max(largest, moved)
            if moved < 1 + _CONVERGED:
                break
        figures = {"passes": float(passes), "largest_factor": largest, "weights": len(chain) + 1.0}
        return figures | ({"absorbed_channels": float(absorbed)} if self.options.absorb else {})


def equalize(rewriter: GraphRewriter, edge: ChannelEdge) -> float:
    """Equalize the ranges of each channel of `edge`; returns the factor furthest from 1, as one above it."""
    produced = rewriter.producer_weight(edge).abs().amax(0).cpu()
    weights = {c.module: rewriter.consumer_weight(c).abs().amax(0) for c in edge.consumers}
    factors = safe_factors((produced / largest_per_channel(edge, weights)).sqrt(), edge)
    rewriter.scale(edge, factors)
    return float(torch.maximum(factors, 1 / factors).amax())


def absorb(rewriter: GraphRewriter, edge: ChannelEdge, statistics: Statistics) -> int:
    """Move the least value of each channel of `edge`, where it is above zero, into the biases of its consumers; returns
    the number of these channels."""
    if rewriter.unshiftable(edge) is not None or any(consumer.module not in statistics for consumer in edge.consumers):
        return 0
    least = torch.full((edge.width,), torch.inf)
    for consumer in edge.consumers:
        seen = statistics[consumer.module].get("least", consumer.module).cpu().float()
        owned = consumer.columns >= 0
        least = least.scatter_reduce(0, consumer.columns[owned], seen[owned], "amin")
    amounts = torch.where(torch.isfinite(least), least, 0).clamp(min=0)
    if bool(amounts.any()):
        rewriter.absorb(edge, amounts)
    return int((amounts > 0).sum())


def _next(graph: Graph, producer: str) -> list[str]:
    """The consumers of a producer that are producers themselves."""
    consumers = [consumer.module for consumer in graph.by_producer[producer].consumers]
    return [name for name in consumers if name in graph.by_producer and name != producer]


def _chain(graph: Graph, head: str) -> list[ChannelEdge]:
    """The edges from `head` on, each once."""
    names = [head]
    for name in names:
        names += [n for n in _next(graph, name) if n not in names and graph.by_producer[n].layer.kind in _KINDS]
    return [graph.by_producer[name] for name in names]


def _unfit(edge: ChannelEdge, graph: Graph, specs: Specs) -> str | None:
    own = "weight" in specs.get(edge.producer, {})
    if not own and not quantized(edge, specs, "weight"):
        return "neither its weight nor one that reads it is quantized"
    if edge.ops_between & {"gain"}:
        return "between it and what reads it tokens are weighted"
    return unscalable(edge, graph)
