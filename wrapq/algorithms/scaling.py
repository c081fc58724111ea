"""Common parts of transforms that scale the channels of an edge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from wrapq.graph.dataflow import ChannelEdge, Consumer, Graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.input import quadratic
from wrapq.wrappers.model import Specs


def unscalable(edge: ChannelEdge, graph: Graph) -> str | None:
    """Why no channel of `edge` can be scaled; None where at least some can."""
    if edge.unowned:
        return f"its output is also seen by {', '.join(edge.other_consumers)}"
    if edge.layer.produces is None:
        return "it has no weight of its own"
    return graph.tied_reason(edge.modules)


def with_own_inputs(reasons: Mapping[str, str | None], graph: Graph, specs: Specs, point: str) -> dict[str, str | None]:
    """`reasons` not to scale the edge of each producer, and the own inputs of those linears with a quantized `point`
    that no such edge serves; reasons of which that makes nothing are left out."""
    served = {c.module for name, reason in reasons.items() if reason is None for c in graph.by_producer[name].consumers}
    own = [edge for edge in graph.own_inputs.values() if quantized(edge, specs, point)]
    own = [edge for edge in own if not any(consumer.module in served for consumer in edge.consumers)]
    taken = {consumer.module for edge in own for consumer in edge.consumers}
    kept = {
        name: reason
        for name, reason in reasons.items()
        if reason is None or any(consumer.module not in taken for consumer in graph.by_producer[name].consumers)
    }
    return kept | {edge.producer: graph.tied_reason(edge.modules) for edge in own}


def own_consumers(graph: Graph, targets: Iterable[str]) -> tuple[str, ...]:
    """The linears whose own inputs are among `targets`."""
    own = [graph.own_inputs[target] for target in targets if target in graph.own_inputs]
    return tuple(consumer.module for edge in own for consumer in edge.consumers)


def quantized(edge: ChannelEdge, specs: Specs, point: str) -> bool:
    """Whether `point` of one of the edge's consumers is quantized."""
    return any(point in specs.get(consumer.module, {}) for consumer in edge.consumers)


def largest_per_channel(edge: ChannelEdge, values: Mapping[str, Tensor]) -> Tensor:
    """For each channel [N] of `edge` the largest of `values` [K], which are given by the names of its consumers; those
    without values do not count."""
    given = [consumer for consumer in edge.consumers if consumer.module in values]
    return torch.stack([consumer.reduce_max(values[consumer.module].cpu(), edge.width) for consumer in given]).amax(0)


def safe_factors(factors: Tensor, edge: ChannelEdge) -> Tensor:
    """`factors` [N], and 1 for channels that are not owned and where they are 0 or not finite, as for dead channels."""
    return torch.where(torch.isfinite(factors) & (factors > 0) & edge.owned, factors, 1.0)


def quantized_linears(rewriter: GraphRewriter, edge: ChannelEdge) -> Iterator[tuple[Consumer, Tensor, QuantSpec]]:
    """The consumers that are linears with a statically quantized weight, whose error a Hessian gives: the consumer, its
    weight [N, K] and its spec."""
    for consumer in edge.consumers:
        spec = rewriter.specs.get(consumer.module, {}).get("weight")
        if consumer.layer.kind == "linear" and spec is not None and not spec.dynamic:
            yield consumer, rewriter.consumer_weight(consumer), spec


def round_scaled(weight: Tensor, factors: Tensor, spec: QuantSpec, where: str) -> Tensor:
    """`Q(W S) S^-1`: a weight [N, K], rounded to nearest after its columns were scaled by `factors` [K]."""
    scaled = weight * factors
    return observe_tensor(scaled, spec, where).fake_quantize(scaled) / factors


def scaled_error(weight: Tensor, factors: Tensor, spec: QuantSpec, hessian: Tensor, where: str) -> float:
    """`tr(D H D^T)`, `D = Q(W S) S^-1 - W`: the squared error of `round_scaled` in the output of a linear, summed over
    the rows of its input."""
    difference = round_scaled(weight, factors, spec, where) - weight
    return float(quadratic(difference, hessian.to(difference)).sum())
