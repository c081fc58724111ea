"""AdaRound: each weight goes up or down, whichever costs the layer's output less, learned for all weights together.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv:2004.10568, equations 21 to 24. The
error of the output `|W X - W~ X|^2` is `tr(D H D^T)` for `D = W~ - W` and the Hessian `H = X X^T`, so that the samples
themselves are not needed, and each step sees all of them.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from wrapq.algorithms.base import ALGORITHMS, Rounded, Rounder
from wrapq.algorithms.columns import spread
from wrapq.observers.base import observe_tensor
from wrapq.quant.affine import storage_dtype
from wrapq.quant.spec import QuantSpec
from wrapq.registry import Options
from wrapq.statistics.input import InputStatistics, quadratic

_LOW, _HIGH = -0.1, 1.1
"""The ends of the stretched sigmoid, so that it reaches 0 and 1."""


class AdaRoundOptions(Options):
    """Options of AdaRound."""

    iterations: int = Field(500, ge=1, description="Steps of Adam.")
    lr: float = Field(0.05, gt=0, description="Adam's step.")
    regularizer: float = Field(
        1.0, ge=0, description="What pushes each weight to a neighbour; relative to the error of rounding to nearest."
    )
    warm_start: float = Field(0.2, ge=0, lt=1, description="The part of the steps without the regularizer.")
    beta_start: float = Field(20.0, gt=0, description="The regularizer's exponent after the warm start.")
    beta_end: float = Field(2.0, gt=0, description="And at the end.")


@ALGORITHMS.register("adaround")
class AdaRound(Rounder):
    """AdaRound on integer grids, in the ranges of the spec's observer; a row that learning left worse than rounding to
    nearest is rounded to nearest."""

    Options = AdaRoundOptions
    options: AdaRoundOptions
    needs = ("hessian",)
    groups_at_once = True  # a step for the nine weights of a depthwise channel takes as long as for all channels

    def unsupported(self, spec: QuantSpec) -> str | None:
        if spec.zero_point != "int":
            return "its neighbours are those of an integer zero point"
        return None if spec.dtype.kind == "int" else "the numbers of its grid are not evenly spaced"

    def round(self, weight: Tensor, spec: QuantSpec, where: str, statistics: InputStatistics | None = None) -> Rounded:
        statistics, weight = statistics or InputStatistics(), weight.float()
        hessian = statistics.get("hessian", where).float() / statistics.rows
        qparams = observe_tensor(weight, spec, where)
        scale, grid = spread(qparams.effective_scale, weight.shape, spec), (spec.dtype.qmin, spec.dtype.qmax)
        zero = torch.zeros_like(scale) if qparams.zero_point is None else spread(qparams.zero_point, weight.shape, spec)
        shape = (statistics.groups, -1, weight.shape[1]) if statistics.groups > 1 else weight.shape
        parts = (weight.reshape(shape), scale.reshape(shape), zero.reshape(shape))
        up = learn_rounding(*parts, hessian, grid, self.options)
        learned = (torch.floor(weight / scale) + up.reshape(weight.shape) + zero).clamp(*grid)
        nearest = qparams.quantize(weight).float()
        lost, before = (quadratic((codes - zero) * scale - weight, hessian) for codes in (learned, nearest))
        worse = lost > before
        codes = torch.where(worse[:, None], nearest, learned).to(storage_dtype(spec.dtype))
        return Rounded(codes, qparams, {"rows_to_nearest": float(worse.sum())})


def learn_rounding(
    weight: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor, grid: tuple[int, int], options: AdaRoundOptions
) -> Tensor:
    """For each `weight` [N, K], float32, whether it goes up from the grid point below it, as 0 or 1; `scale` and `zero`
    are as wide as it, `hessian` is [K, K], `grid` has the ends. With G groups of rows all have G in front.

    The error of the output is counted relative to that of rounding to nearest, times the number of weights, so that the
    regularizer weighs the same whatever the layer's numbers are.
    """
    steps = weight / scale
    below = steps.floor()
    rest = (steps - below).clamp(1e-4, 1 - 1e-4)
    v = torch.log((rest - _LOW) / (_HIGH - rest))  # h(V) is the rest: the float weight itself
    nearest = ((steps.round() + zero).clamp(*grid) - zero) * scale - weight
    lost = quadratic(nearest, hessian).sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    unit = lost[..., None, None] / weight.shape[-2:].numel()
    optimizer = torch.optim.Adam([v], lr=options.lr)
    for step in range(options.iterations):
        v.grad = gradient(v, weight, below, scale, zero, hessian / unit, grid, *_annealed(step, options))
        optimizer.step()
    return (v.sigmoid() * (_HIGH - _LOW) + _LOW >= 0.5).float()


def gradient(
    v: Tensor,
    weight: Tensor,
    below: Tensor,
    scale: Tensor,
    zero: Tensor,
    hessian: Tensor,
    grid: tuple[int, int],
    regularizer: float,
    beta: float,
) -> Tensor:
    """The derivative by `v` [N, K] of `tr(D H D^T) + regularizer * sum(1 - |2 h(V) - 1|^beta)`, in closed form."""
    sigmoid = v.sigmoid()
    stretched = sigmoid * (_HIGH - _LOW) + _LOW
    h = stretched.clamp(0, 1)
    codes = below + h + zero
    inside = (codes >= grid[0]) & (codes <= grid[1])
    difference = (codes.clamp(*grid) - zero) * scale - weight
    by_h = 2 * (difference @ hessian) * scale * inside
    if regularizer:
        off = 2 * h - 1
        by_h -= regularizer * 2 * beta * off.sign() * off.abs().pow(beta - 1)
    moves = (stretched > 0) & (stretched < 1)
    return by_h * moves * sigmoid * (1 - sigmoid) * (_HIGH - _LOW)


def _annealed(step: int, options: AdaRoundOptions) -> tuple[float, float]:
    """The regularizer and its exponent at a step: none at first, then a cosine from the first exponent to the last."""
    warm = options.warm_start * options.iterations
    if step < warm:
        return 0.0, options.beta_start
    done = (step - warm) / max(options.iterations - warm, 1)
    beta = options.beta_end + 0.5 * (options.beta_start - options.beta_end) * (1 + math.cos(done * math.pi))
    return options.regularizer, beta
