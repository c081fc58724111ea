"""AWQ: the columns that large inputs meet are scaled up before rounding, which rounds them finer.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv:2306.00978, equation
5: the scales are `s = mean|x|^a`, and `a` is searched for the least error of `Q(W s) (x / s)` against `W x`. Here that
error is `tr(D H D^T)` with `D = Q(W s) / s - W` and `H = X^T X`, the same number without running the model again.
`replay` compares the best of them by the error in the output of their block, as the paper's code compares all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from wrapq.algorithms.replay import Replay
from wrapq.algorithms.scaling import input_largest, scaled_error, scored, unscalable, usable
from wrapq.calibration.algorithm import ALGORITHMS, RUNS, Found, Transform
from wrapq.calibration.graph import Feed, Graph
from wrapq.calibration.statistics import InputStatistics
from wrapq.calibration.surgery import Surgeon
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.model import Specs


class AWQOptions(BaseModel):
    """Options of `awq`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grid: int = Field(20, ge=1, description="How many exponents between 0 and 1 are tried.")
    duo: bool = Field(True, description="Try scales that take the weights' own magnitudes into account, too.")
    replay: int = Field(
        0, ge=0, description="So many of the best are compared again, by running their block on one batch with each."
    )


@ALGORITHMS.register("awq")
class AWQ(Transform):
    """Scales what feeds linears with quantized weights, wherever a weight lies before that takes it back.

    Clipping, the paper's second step, is a choice of ranges: `seqmse`, or `gptq` with `ranges: hessian`, after it.
    """

    Options = AWQOptions
    options: AWQOptions
    migrates = True

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Algorithm.needs`."""
        return ("hessian", "mean_abs", *((RUNS,) if self.options.replay else ()))

    def find(self, graph: Graph, specs: Specs) -> Found:
        """See `Transform.find`."""
        left = {f.producer: reason for f in graph.feeds if (reason := _unfit(f, graph, specs)) is not None}
        return Found(tuple(feed.producer for feed in graph.feeds if feed.producer not in left), left)

    def apply(self, surgeon: Surgeon, target: str, statistics: Mapping[str, InputStatistics]) -> Mapping[str, float]:
        """See `Transform.apply`."""
        feed = surgeon.graph.by_producer[target]
        tried = [torch.ones(len(feed.channels)), *self.candidates(surgeon, feed, statistics)]
        errors = [awq_error(surgeon, feed, factors, statistics) for factors in tried]
        order, figures = sorted(range(len(tried)), key=errors.__getitem__), {}
        best = order[0]
        if self.options.replay:
            replay = Replay(surgeon, [reader.module for reader in feed.readers])
            again = {i: replayed_error(surgeon, feed, replay, tried[i]) for i in {0, *order[: self.options.replay]}}
            best = min(again, key=again.__getitem__)
            figures["block_error"] = again[best] / again[0] if again[0] else 1.0
        surgeon.scale(feed, tried[best])
        figures["error"] = errors[best] / errors[0] if errors[0] else 1.0
        return figures | {"largest_factor": float(tried[best].amax())}

    def candidates(self, surgeon: Surgeon, feed: Feed, statistics: Mapping[str, InputStatistics]) -> Iterator[Tensor]:
        """The scales [N] that are tried, besides none."""
        most = max(its.rows for its in statistics.values())  # of a mixture its router's: all tokens come to it
        seen = {name: its for name, its in statistics.items() if its.rows == most}
        x = input_largest(feed, {name: its.get("mean_abs", name) for name, its in seen.items()})
        given = [(reader, relative_magnitude(weight, spec)) for reader, weight, spec in scored(surgeon, feed)]
        w = torch.stack([reader.gather(its.cpu(), len(feed.channels)) for reader, its in given]).mean(0)
        for step in range(self.options.grid):
            ratio = step / self.options.grid
            yield centred(x**ratio, feed)
            if self.options.duo:
                yield centred(x**ratio / (w ** (1 - ratio) + 1e-4), feed)


def centred(factors: Tensor, feed: Feed) -> Tensor:
    """`factors` [N] divided by the geometric mean of the largest and the smallest; 1 where there are none."""
    own = factors[feed.channels].clamp(min=1e-4)
    return usable(factors.clamp(min=1e-4) / (own.amax() * own.amin()).sqrt(), feed)


def relative_magnitude(weight: Tensor, spec: QuantSpec) -> Tensor:
    """How large the elements of each column [K] of a weight [N, K] are, as mean part of the largest that shares their
    scale."""
    size = spec.group_size if spec.granularity == "group" else weight.shape[1]
    parts = weight.abs().unflatten(1, (-1, size or 1))
    return (parts / parts.amax(-1, keepdim=True).clamp(min=1e-6)).flatten(1).mean(0)


def awq_error(surgeon: Surgeon, feed: Feed, factors: Tensor, statistics: Mapping[str, InputStatistics]) -> float:
    """The squared error in the outputs of all readers of `feed` with quantized weights, summed over the calibration
    rows that come to each, for scales `factors` [N]."""
    return sum(
        scaled_error(
            weight,
            reader.spread(factors).to(weight.device),
            spec,
            statistics[reader.module].get("hessian", reader.module),
            reader.module,
        )
        for reader, weight, spec in scored(surgeon, feed)
        if reader.module in statistics
    )


def replayed_error(surgeon: Surgeon, feed: Feed, replay: Replay, factors: Tensor) -> float:
    """The squared error in the output of the block, for scales `factors` [N]."""
    weights = {}
    for reader, weight, spec in scored(surgeon, feed):
        spread, slot = reader.spread(factors).to(weight.device), reader.leaf.reads
        rounded = observe_tensor(weight * spread, spec, reader.module).fake_quantize(weight * spread) / spread
        held = surgeon.model.get_submodule(reader.module).get_parameter("weight")
        layout = rounded if slot is not None and slot.columns == 1 else rounded.t()
        weights[f"{reader.module}.weight"] = layout.to(held.dtype)
    return replay.error(weights)


def _unfit(feed: Feed, graph: Graph, specs: Specs) -> str | None:
    linears = [reader for reader in feed.readers if reader.leaf.kind == "linear"]
    if not any("weight" in specs.get(reader.module, {}) for reader in linears):
        return "no linear that reads it has a quantized weight"
    return unscalable(feed, graph)
