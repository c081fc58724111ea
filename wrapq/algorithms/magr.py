"""MagR: weights are made smaller, as far as the layer's output hardly changes, so that their grid can be finer.

Zhang et al., "MagR: Weight Magnitude Reduction for Enhancing Post-Training Quantization", arXiv:2406.00800: for each
row `w_0` of a weight, `min_w 1/2 |X w - X w_0|^2 + alpha |w|_inf` by proximal gradient descent (algorithm 1). The
largest eigenvalue of the Hessian `X^T X` is taken to be 1 here: that makes 1 the step length and `alpha` free of units.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from wrapq.calibration.algorithm import ALGORITHMS, Found, Transform
from wrapq.calibration.graph import Graph
from wrapq.calibration.statistics import InputStatistics, quadratic
from wrapq.calibration.surgery import Surgeon
from wrapq.wrappers.model import Specs

_MOST_STEPS = 50  # of Newton's method; a few are enough


class MagROptions(BaseModel):
    """Options of `magr`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: float = Field(0.001, gt=0, description="How much smaller weights are worth against the layer's error.")
    iterations: int = Field(150, ge=1, description="Steps of the gradient descent.")


@ALGORITHMS.register("magr")
class MagR(Transform):
    """Makes the largest weight of each row smaller; the one transform that changes the model's function a little."""

    Options = MagROptions
    options: MagROptions
    band = 0.3

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Algorithm.needs`."""
        return ("hessian",)

    def find(self, graph: Graph, specs: Specs) -> Found:
        """See `Transform.find`."""
        readers = {r.module: r for feeds in graph.by_reader.values() for feed in feeds for r in feed.readers}
        linears = [name for name, r in readers.items() if r.leaf.kind == "linear" and "weight" in specs.get(name, {})]
        left = {name: f"it is tied to {', '.join(graph.tied[name])}" for name in linears if name in graph.tied}
        return Found(tuple(name for name in linears if name not in left), left)

    def inputs(self, graph: Graph, target: str) -> tuple[str, ...]:
        """See `Transform.inputs`."""
        return (target,)

    def apply(self, surgeon: Surgeon, target: str, statistics: Mapping[str, InputStatistics]) -> Mapping[str, float]:
        """See `Transform.apply`."""
        reader = next(r for r in surgeon.graph.by_reader[target][0].readers if r.module == target)
        weight, hessian = surgeon.columns(reader), statistics[target].get("hessian", target)
        reduced = reduce_magnitude(weight, hessian, self.options.alpha, self.options.iterations)
        surgeon.rewrite(reader, reduced)
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
