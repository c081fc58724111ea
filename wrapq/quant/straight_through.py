"""The gradient of a quantization, which has none of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor


def straight_through(x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    """`quantize(x)`, with the gradient of `x` itself: Bengio et al., "Estimating or Propagating Gradients Through
    Stochastic Neurons for Conditional Computation", arXiv:1308.3432, section 4."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return quantize(x)
    return cast(Tensor, _StraightThrough.apply(x, quantize))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        return quantize(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return *gradients, None
