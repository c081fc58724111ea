"""SmoothQuant: what makes activations hard to quantize moves into the weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438, equation 4: the channel j of a linear's input is divided, and column j of its weight multiplied, by
`s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from wrapq.algorithms.scaling import input_largest, quantized, scaled_error, scored, unscalable, usable
from wrapq.calibration.algorithm import ALGORITHMS, Found, Transform
from wrapq.calibration.graph import Feed, Graph
from wrapq.calibration.statistics import InputStatistics
from wrapq.calibration.surgery import Surgeon
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.model import Specs

_GRID = tuple(step / 20 for step in range(21))


class SmoothQuantOptions(BaseModel):
    """Options of `smoothquant`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = Field(
        0.5, description="How much moves into the weights; `search` takes the least error for each input, of 21 values."
    )
    feeds: Literal["norms", "all"] = Field(
        "norms", description="Scale what norms give, as the paper does, or also what attention and products give."
    )


@ALGORITHMS.register("smoothquant")
class SmoothQuant(Transform):
    """Smooths the inputs that are quantized and come from a norm, or from any module whose rows can be scaled."""

    Options = SmoothQuantOptions
    options: SmoothQuantOptions
    migrates = True

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Algorithm.needs`."""
        return ("absmax", "hessian") if self.options.alpha == "search" else ("absmax",)

    def find(self, graph: Graph, specs: Specs) -> Found:
        """See `Transform.find`."""
        feeds = [feed for feed in graph.feeds if self.options.feeds == "all" or feed.leaf.kind == "norm"]
        left = {feed.producer: reason for feed in feeds if (reason := _unfit(feed, graph, specs)) is not None}
        return Found(tuple(feed.producer for feed in feeds if feed.producer not in left), left)

    def apply(self, surgeon: Surgeon, target: str, statistics: Mapping[str, InputStatistics]) -> Mapping[str, float]:
        """See `Transform.apply`."""
        feed = surgeon.graph.by_producer[target]
        x = input_largest(feed, {name: its.get("absmax", name) for name, its in statistics.items()})
        w = input_largest(feed, {r.module: surgeon.columns(r).abs().amax(0) for r in feed.readers})
        if self.options.alpha == "search":
            errors = {a: smoothed_error(surgeon, feed, smoothing(x, w, a, feed), statistics) for a in _GRID}
            alpha = min(errors, key=errors.__getitem__)
        else:
            alpha = self.options.alpha
        factors = smoothing(x, w, alpha, feed)
        surgeon.scale(feed, factors)
        return {"alpha": alpha, "largest_factor": float(factors.amax()), "smallest_factor": float(factors.amin())}


def smoothing(x: Tensor, w: Tensor, alpha: float, feed: Feed) -> Tensor:
    """Equation 4 for the largest inputs `x` [N] and weights `w` [N]; 1 for channels of zeros."""
    return usable(x**alpha / w ** (1 - alpha), feed)


def smoothed_error(surgeon: Surgeon, feed: Feed, factors: Tensor, statistics: Mapping[str, InputStatistics]) -> float:
    """What quantizing the weights and inputs of the readers of `feed` adds to their outputs, squared and summed.

    The weights' part is exact for inputs left float; the inputs' part takes their rounding errors as independent and
    uniform, `step^2 / 12` each, or as large as the channel itself where that is less, which meets the weights as
    `sum_ij W_ij^2 s_j^2`. The relative errors of floating-point
    grids do not depend on the scale of a channel and are left out.
    """
    total = 0.0
    for reader, weight, spec in scored(surgeon, feed):
        if (its := statistics.get(reader.module)) is None:
            continue
        spread = reader.spread(factors).to(weight.device)
        hessian = its.get("hessian", reader.module)
        total += scaled_error(weight, spread, spec, hessian, reader.module)
        given = surgeon.specs[reader.module].get("input")
        if given is not None and given.dtype.kind == "int":
            steps = input_steps(its.get("absmax", reader.module) / spread, given)
            lost = torch.minimum(steps.square() / 12 * its.rows, hessian.diagonal() / spread.square())
            total += float((lost * (weight * spread).square().sum(0)).sum())
    return total


def input_steps(largest: Tensor, spec: QuantSpec) -> Tensor:
    """The step [K] of each channel of an input whose `largest` magnitudes [K] are known: of the whole tensor unless
    channels or groups of them have scales of their own."""
    size = {"channel": 1, "group": spec.group_size or 1}.get(spec.granularity, len(largest))
    return largest.unflatten(0, (-1, size)).amax(1).repeat_interleave(size) / spec.dtype.half_range


def _unfit(feed: Feed, graph: Graph, specs: Specs) -> str | None:
    if not quantized(feed, specs, "input"):
        return "no input of what reads it is quantized"
    return unscalable(feed, graph)
