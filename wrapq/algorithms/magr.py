"""MagR: the largest weights are made smaller where the layer's output hardly changes, for a finer grid.

Zhang et al., "MagR: Weight Magnitude Reduction for Enhancing Post-Training Quantization", arXiv:2406.00800: for each
row `w_0` of a weight, `min_w 1/2 |X w - X w_0|^2 + alpha |w|_inf` by proximal gradient descent (algorithm 1). The
largest eigenvalue of the Hessian `X^T X` is taken to be 1 here: that makes 1 the step length and `alpha` free of units.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from wrapq.algorithms.base import ALGORITHMS
from wrapq.algorithms.transform import Statistics, Targets, Transform
from wrapq.graph.dataflow import Graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.registry import Options
from wrapq.statistics.input import quadratic
from wrapq.wrappers.model import Specs

_MOST_STEPS = 50  # of Newton's method; a few are enough


class MagROptions(Options):
    """Options of `magr`."""

    alpha: float = Field(0.001, gt=0, description="How much smaller weights are worth against the layer's error.")
    iterations: int = Field(150, ge=1, description="Steps of the gradient descent.")


@ALGORITHMS.register("magr")
class MagR(Transform):
    """Makes the largest weight of each row smaller; the one transform that changes the model's function a little."""

    Options = MagROptions
    options: MagROptions
    needs = ("hessian",)
    tolerance = 0.3

    def find_targets(self, graph: Graph, specs: Specs) -> Targets:
        linears = [name for name, consumer in graph.consumers.items() if consumer.layer.kind == "linear"]
        quantized = [name for name in linears if "weight" in specs.get(name, {})]
        skipped = {name: f"it is tied to {', '.join(graph.tied[name])}" for name in quantized if name in graph.tied}
        return Targets(tuple(name for name in quantized if name not in skipped), skipped)

    def inputs(self, graph: Graph, target: str) -> tuple[str, ...]:
        return (target,)

    def apply(self, rewriter: GraphRewriter, target: str, statistics: Statistics) -> Mapping[str, float]:
        consumer = rewriter.graph.consumers[target]
        weight, hessian = rewriter.consumer_weight(consumer), statistics[target].get("hessian", target)
        reduced = reduce_magnitude(weight, hessian, self.options.alpha, self.options.iterations)
        rewriter.rewrite(consumer, reduced)
        moved = reduced - weight
        before, error = (float(quadratic(m, hessian).sum()) for m in (weight, moved))
        return {
            "largest": float((reduced.abs().amax(1) / weight.abs().amax(1).clamp(min=1e-12)).mean()),
            "output_error": error / before if before else 0.0,
        }


def reduce_magnitude(weight: Tensor, hessian: Tensor, alpha: float, iterations: int) -> Tensor:
    """`weight` [N, K] after `iterations` of `w <- prox(w - (w - w_0) H)`, `H` [K, K] of largest eigenvalue 1."""
    hessian = hessian.to(weight) / torch.linalg.eigvalsh(hessian.double())[-1].clamp(min=1e-30).to(weight)
    reduced, level = weight.clone(), None
    for _ in range(iterations):
        reduced, level = shrink_largest(reduced - (reduced - weight) @ hessian, alpha, level)
    return reduced


def shrink_largest(rows: Tensor, amount: float, near: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The proximal operator of `amount * |.|_inf` for each row [N, K]: what the row's projection onto the l1 ball of
    radius `amount` leaves of it, a clip of its largest elements; and the level [N, 1] they are clipped to.

    Above the level lies `amount` in all, and what lies above falls with it in straight pieces: Newton's method ends at
    the very level, and soon where it starts `near` it.
    """
    sizes = rows.abs()
    level = (sizes.amax(1, keepdim=True) - amount).clamp(min=0) if near is None else near
    count = torch.zeros_like(level)
    for _ in range(_MOST_STEPS):
        above = sizes > level
        before, count = count, above.sum(1, keepdim=True).to(rows.dtype).clamp(min=1)
        level = ((torch.where(above, sizes, 0).sum(1, keepdim=True) - amount) / count).clamp(min=0)
        if torch.equal(before, count):
            break
    return rows.clamp(-level, level), level
