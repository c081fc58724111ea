"""Cross-layer equalization: each channel gets the same range in the weight that makes it and in those that read it.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv:1906.04721, equation 11:
for a channel whose largest weights are `r1` where it is made and `r2` where it is read, `s = sqrt(r1 / r2)`, by which
the first is divided and the second multiplied. Where feeds follow each other it is repeated until nothing moves. Batch
norms between are folded first, as in the paper; what a ReLU6 clips is left, for the paper puts a ReLU in its place.

Section 4.1.3, absorbing high biases: a constant that a channel always exceeds passes the ReLU and moves into the next
bias. The paper takes three deviations below the mean that a batch norm tells; here it is the least value in the data.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field

from wrapq.algorithms.scaling import input_largest, quantized, unscalable, usable
from wrapq.calibration.algorithm import ALGORITHMS, Found, Transform
from wrapq.calibration.graph import Feed, Graph
from wrapq.calibration.statistics import InputStatistics
from wrapq.calibration.surgery import Surgeon
from wrapq.wrappers.model import Specs

_SETTLED = 1e-3
_KINDS = ("linear", "conv")


class CLEOptions(BaseModel):
    """Options of `cle`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
        """See `Algorithm.needs`."""
        return ("least",) if self.options.absorb else ()

    def find(self, graph: Graph, specs: Specs) -> Found:
        """See `Transform.find`."""
        pairs = [feed for feed in graph.feeds if feed.leaf.kind in _KINDS]
        left = {feed.producer: reason for feed in pairs if (reason := _unfit(feed, graph, specs)) is not None}
        fit = [feed.producer for feed in pairs if feed.producer not in left]
        follow = {name for producer in fit for name in _next(graph, producer)}
        return Found(tuple(name for name in fit if name not in follow), left)

    def inputs(self, graph: Graph, target: str) -> tuple[str, ...]:
        """See `Transform.inputs`."""
        return tuple(reader.module for feed in _chain(graph, target) for reader in feed.readers)

    def apply(self, surgeon: Surgeon, target: str, statistics: Mapping[str, InputStatistics]) -> Mapping[str, float]:
        """See `Transform.apply`."""
        chain = [f for f in _chain(surgeon.graph, target) if _unfit(f, surgeon.graph, surgeon.specs) is None]
        for feed in chain:
            surgeon.fold_batch_norm(feed.norm)
        passes, largest = 0, 1.0
        absorbed = sum(absorb(surgeon, feed, statistics) for feed in chain) if self.options.absorb else 0
        for _ in range(self.options.iterations):
            moved = max(equalize(surgeon, feed) for feed in chain)
            passes += 1
            largest = max(largest, moved)
            if moved < 1 + _SETTLED:
                break
        figures = {"passes": float(passes), "largest_factor": largest, "weights": len(chain) + 1.0}
        return figures | ({"absorbed_channels": float(absorbed)} if self.options.absorb else {})


def equalize(surgeon: Surgeon, feed: Feed) -> float:
    """Give each channel of `feed` one range on both sides; returns the factor furthest from 1, as one above it."""
    made = surgeon.rows(feed).abs().amax(0).cpu()
    read = input_largest(feed, {r.module: surgeon.columns(r).abs().amax(0) for r in feed.readers})
    factors = usable((made / read).sqrt(), feed)
    surgeon.scale(feed, factors)
    return float(torch.maximum(factors, 1 / factors).amax())


def absorb(surgeon: Surgeon, feed: Feed, statistics: Mapping[str, InputStatistics]) -> int:
    """Move the least value of each channel of `feed`, where it is above zero, into the biases of what reads it;
    returns of how many."""
    if surgeon.unshiftable(feed) is not None or any(reader.module not in statistics for reader in feed.readers):
        return 0
    least = torch.full((len(feed.channels),), torch.inf)
    for reader in feed.readers:
        seen = statistics[reader.module].get("least", reader.module).cpu().float()
        owned = reader.columns >= 0
        least = least.scatter_reduce(0, reader.columns[owned], seen[owned], "amin")
    amounts = torch.where(torch.isfinite(least), least, 0).clamp(min=0)
    if bool(amounts.any()):
        surgeon.absorb(feed, amounts)
    return int((amounts > 0).sum())


def _next(graph: Graph, producer: str) -> list[str]:
    """The readers of a feed that make channels of feeds themselves."""
    readers = graph.by_producer[producer].readers
    return [r.module for r in readers if r.module in graph.by_producer and r.module != producer]


def _chain(graph: Graph, head: str) -> list[Feed]:
    """The feeds from `head` on, each once."""
    names = [head]
    for name in names:
        names += [n for n in _next(graph, name) if n not in names and graph.by_producer[n].leaf.kind in _KINDS]
    return [graph.by_producer[name] for name in names]


def _unfit(feed: Feed, graph: Graph, specs: Specs) -> str | None:
    own = "weight" in specs.get(feed.producer, {})
    if not own and not quantized(feed, specs, "weight"):
        return "neither its weight nor one that reads it is quantized"
    if feed.path & {"gain"}:
        return "between it and what reads it tokens are weighted"
    return unscalable(feed, graph)
