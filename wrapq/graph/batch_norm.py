"""Batch norms in evaluation mode: an affine function per channel, which the layer before them can absorb.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv:1906.04721, section 3.2,
and Jacob et al., arXiv:1712.05877, equation 14: a convolution with weight W and bias b and the batch norm behind it are
one with `W' = gain * W` and `b' = gain * b + shift`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def is_affine(module: nn.Module) -> bool:
    """Whether `module` is a batch norm with fixed statistics and a weight."""
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
    """Whether a batch norm is the identity, as `make_identity` makes it."""
    bare = torch.full_like(norm.running_var, 1 - norm.eps)
    return (
        bool((norm.weight == 1).all())
        and not bool(norm.bias.any() | norm.running_mean.any())
        and torch.equal(norm.running_var, bare)
    )


@torch.no_grad()
def make_identity(norm: Any) -> None:
    """Turn a batch norm into the identity; the module stays, as the model's class expects it. The variance is 1 less
    the epsilon that is added to it, so that the division by its root is exact."""
    norm.weight.data.fill_(1)
    norm.bias.data.zero_()
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
