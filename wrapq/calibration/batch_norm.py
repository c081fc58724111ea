"""Batch norms in evaluation: one factor and one constant for each channel, which the module before can have as its own.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv:1906.04721, section 3.2,
and Jacob et al., arXiv:1712.05877, equation 14: for a convolution with weight W and bias b it is one with
`W' = gain * W` and `b' = gain * b + shift`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def is_affine(module: nn.Module) -> bool:
    """Whether `module` is a batch norm that does the same to every input and has a weight to do it with."""
    return (
        isinstance(module, _BatchNorm)
        and not module.training
        and module.running_mean is not None
        and module.running_var is not None
        and module._parameters.get("weight") is not None
    )


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """The `gain` and `shift` [N] with which a batch norm gives `gain * x + shift`, in float64."""
    gain = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return gain, norm.bias.detach().double() - gain * norm.running_mean.double()


def is_identity(norm: Any) -> bool:
    """Whether nothing is left of a batch norm, as `make_identity` leaves it."""
    bare = torch.full_like(norm.running_var, 1 - norm.eps)
    return (
        bool((norm.weight == 1).all())
        and not bool(norm.bias.any() | norm.running_mean.any())
        and torch.equal(norm.running_var, bare)
    )


@torch.no_grad()
def make_identity(norm: Any) -> Callable[[], object]:
    """Let a batch norm give back what it is given; returns what puts its statistics back.

    The module stays, so that the model has the layers that its class makes. The variance is less than 1 by what is
    added to it, so that dividing by its root changes nothing.
    """
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    norm.weight.data.fill_(1)
    norm.bias.data.zero_()
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)

    def undo() -> None:
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    return undo
