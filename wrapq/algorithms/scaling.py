"""What transforms that scale the channels of a feed have in common."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wrapq.calibration.graph import Feed, Graph, Reader
from wrapq.calibration.statistics import quadratic
from wrapq.calibration.surgery import Surgeon
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.model import Specs


def unscalable(feed: Feed, graph: Graph) -> str | None:
    """Why the channels of `feed` cannot be scaled; None where at least some can."""
    if feed.open:
        return f"its output is also seen by {', '.join(feed.seen_by)}"
    if feed.leaf.writes is None:
        return "it has no weight of its own"
    for name in filter(None, (feed.producer, feed.norm, *(reader.module for reader in feed.readers))):
        if name in graph.tied:
            return f"{name} is tied to {', '.join(graph.tied[name])}"
    return None


def quantized(feed: Feed, specs: Specs, point: str) -> bool:
    """Whether `point` of one of its readers is quantized."""
    return any(point in specs.get(reader.module, {}) for reader in feed.readers)


def input_largest(feed: Feed, values: dict[str, Tensor]) -> Tensor:
    """For each channel [N] of `feed` the largest of its readers' `values` [K], by the names of those that have any."""
    width = len(feed.channels)
    given = [reader for reader in feed.readers if reader.module in values]
    return torch.stack([reader.gather(values[reader.module].cpu(), width) for reader in given]).amax(0)


def usable(factors: Tensor, feed: Feed) -> Tensor:
    """`factors` [N], 1 where they are zero or not finite, as of channels that are always zero, or not to be scaled."""
    good = torch.isfinite(factors) & (factors > 0) & feed.channels
    return torch.where(good, factors, 1.0)


def scored(surgeon: Surgeon, feed: Feed) -> Iterator[tuple[Reader, Tensor, QuantSpec]]:
    """The readers whose error a Hessian tells, quantized linears: their weight [N, K] and its spec."""
    for reader in feed.readers:
        spec = surgeon.specs.get(reader.module, {}).get("weight")
        if reader.leaf.kind == "linear" and spec is not None and not spec.dynamic:
            yield reader, surgeon.columns(reader), spec


def scaled_error(weight: Tensor, factors: Tensor, spec: QuantSpec, hessian: Tensor, where: str) -> float:
    """`tr(D H D^T)`, `D = Q(W S) S^-1 - W`: the squared error in the output of a linear whose weight [N, K] is rounded
    to nearest after its columns were scaled by `factors` [K], summed over the rows of its input."""
    scaled = weight * factors
    difference = observe_tensor(scaled, spec, where).fake_quantize(scaled) / factors - weight
    return float(quadratic(difference, hessian.to(difference)).sum())
