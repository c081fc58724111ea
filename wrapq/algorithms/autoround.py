"""AutoRound: the rounding of all weights of a block, and their ranges, by signed gradient descent.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", arXiv:2309.05516,
equations 3 to 6. `W~ = s * (clip(round(W / s + V) + z, n, m) - z)` with the scale of the range from `beta * min(W)` to
`alpha * max(W)`; V in [-1/2, 1/2], alpha and beta in [0, 1] go down the sign of the gradient of the squared error of
the block's output.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from wrapq.algorithms.base import ALGORITHMS, BlockProblem, BlockRounder, Rounded
from wrapq.algorithms.columns import spread
from wrapq.observers.base import checked_qparams, make_observer
from wrapq.quant.affine import quantize_elements, range_to_qparams
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec
from wrapq.registry import Options


class AutoRoundOptions(Options):
    """Options of AutoRound."""

    iterations: int = Field(200, ge=1, description="Steps for each block; each looks at one batch.")
    lr: float | None = Field(None, gt=0, description="The first step; null for 1 / iterations. It falls to zero.")
    ranges: bool = Field(True, description="Learn the ranges too, not the rounding alone.")


@ALGORITHMS.register("autoround")
class AutoRound(BlockRounder):
    """AutoRound on integer grids; starts from the ranges of the spec's observer, which it can only narrow. Kept is what
    had the least error, relative to rounding to nearest on the same batch."""

    Options = AutoRoundOptions
    options: AutoRoundOptions

    def unsupported(self, spec: QuantSpec) -> str | None:
        if spec.global_scale or spec.super_blocks:
            return "its scales are relative to another"
        if spec.zero_point != "int":
            return "it learns integer zero points"
        return None if spec.dtype.kind == "int" else "the numbers of its grid are not evenly spaced"

    def round_block(self, problem: BlockProblem) -> dict[str, Rounded]:
        weights = {where: Perturbed(w.matrix, w.spec, where) for where, w in problem.weights.items()}
        error = sign_descent(problem, weights, self.options)
        return {where: weight.rounded(error) for where, weight in weights.items()}


class Perturbed:
    """A weight [N, K] whose rounding is learned, by the steps `v` [N, K] that are added before it, and whose range is,
    by the factors beta and alpha of its ends, `low` and `high`, shaped like the scale."""

    def __init__(self, weight: Tensor, spec: QuantSpec, where: str) -> None:
        self.weight, self.spec = weight, spec
        low, high = make_observer(spec).tensor_range(weight)
        checked_qparams(low, high, spec, where)
        self._range = (low, high) if spec.symmetric else (low.clamp(max=0), high.clamp(min=0))
        self.v = torch.zeros_like(weight)
        # signed scales start where the longer side ends at the lowest level, as they do in the authors' package
        start = spec.dtype.half_range / -spec.dtype.qmin if spec.signed_scale else 1.0
        self.low, self.high = torch.full_like(low, start), torch.full_like(high, start)

    def qparams(self) -> QParams:
        """The scales and zero points of the range."""
        low, high = self._range[0] * self.low, self._range[1] * self.high
        return QParams(self.spec, *range_to_qparams(low.detach(), high.detach(), self.spec))

    def quantized(self) -> Tensor:
        """W~ [N, K], with gradients for `v`, `low` and `high` straight through every rounding."""
        dtype, exact = self.spec.dtype, self.qparams()
        low, high = self._range[0] * self.low, self._range[1] * self.high
        if self.spec.symmetric:
            scale = exact.scale.sign() * torch.maximum(low.abs(), high.abs()) / dtype.half_range
        else:
            scale = (high - low) / (dtype.qmax - dtype.qmin)
        scale = _becomes(scale, exact.scale)
        zero = torch.zeros_like(scale) if exact.zero_point is None else exact.zero_point.float()
        if not self.spec.symmetric:
            zero = _becomes(dtype.qmin - low / scale, zero)
        wide, zero = self._wide(scale), self._wide(zero)
        steps = self.weight / wide + self.v
        codes = (_becomes(steps, steps.round()) + zero).clamp(dtype.qmin, dtype.qmax)
        return (codes - zero) * wide

    def rounded(self, block_error: float) -> Rounded:
        """The codes, in their grid."""
        qparams = self.qparams()
        zero = None if qparams.zero_point is None else self._wide(qparams.zero_point)
        steps = self.weight / self._wide(qparams.scale) + self.v
        codes = quantize_elements(steps, torch.ones(1, device=steps.device), zero, self.spec.dtype)
        return Rounded(codes, qparams, {"block_error": block_error})

    def _wide(self, value: Tensor) -> Tensor:
        return spread(value, self.weight.shape, self.spec)


def sign_descent(problem: BlockProblem, weights: Mapping[str, Perturbed], options: AutoRoundOptions) -> float:
    """Move the `weights` to where the block's output is off least; returns the error relative to where they were. Each
    step looks at one batch; all batches have their turn before one has its next."""
    learned = [tensor for w in weights.values() for tensor in ((w.v, w.low, w.high) if options.ranges else (w.v,))]
    bounds = [(-0.5, 0.5), (0.0, 1.0), (0.0, 1.0)] if options.ranges else [(-0.5, 0.5)]
    first = [problem.loss(i, {k: w.quantized() for k, w in weights.items()}) for i in range(problem.batches)]
    best = torch.ones((), device=learned[0].device)
    kept = [tensor.clone() for tensor in learned]
    for step, batch in enumerate(_turns(problem, options.iterations)):
        with torch.enable_grad():
            for tensor in learned:
                tensor.requires_grad_(True)
            loss = problem.loss(batch, {where: weight.quantized() for where, weight in weights.items()})
            gradients = torch.autograd.grad(loss, learned)
        for tensor in learned:
            tensor.requires_grad_(False)
        error = loss.detach() / first[batch].clamp(min=torch.finfo(torch.float32).tiny)
        better = error < best
        best = torch.where(better, error, best)
        length = (options.lr or 1 / options.iterations) * (1 - step / options.iterations)
        for i, (tensor, gradient) in enumerate(zip(learned, gradients, strict=True)):
            torch.where(better, tensor, kept[i], out=kept[i])
            tensor.add_(gradient.sign(), alpha=-length).clamp_(*bounds[i % len(bounds)])
    for tensor, final in zip(learned, kept, strict=True):
        tensor.copy_(final)
    return float(best)


def _turns(problem: BlockProblem, iterations: int) -> list[int]:
    generator = torch.Generator().manual_seed(problem.seed)
    rounds = -(-iterations // problem.batches)
    orders = [torch.randperm(problem.batches, generator=generator) for _ in range(rounds)]
    return torch.cat(orders)[:iterations].tolist()


def _becomes(x: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of `x`."""
    return x + (value - x).detach()
