"""The gain of a norm, whichever way its family stores it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wrapq.errors import ModelError


def norm_offset(norm: Any, name: str) -> float:
    """The constant added to a norm's weight to get its gain: 0, or 1 in families whose norms multiply by `1 + weight`;
    measured by running the norm, so that no table of families is needed. Raises `ModelError` for a norm that uses its
    weight in another way."""
    weight = norm._parameters["weight"]
    x = torch.linspace(-1, 2, weight.shape[-1], dtype=weight.dtype, device=weight.device)
    saved = norm._parameters.copy()
    try:
        norm._parameters |= {key: torch.zeros_like(value) for key, value in saved.items() if value is not None}
        none = norm(x[None])
        norm._parameters["weight"] = torch.ones_like(weight)
        once = norm(x[None])
    finally:
        norm._parameters.update(saved)
    if bool((none == 0).all()) and bool((once != 0).any()):
        return 0.0
    if torch.allclose(once, 2 * none):
        return 1.0
    raise ModelError(f"{name} ({type(norm).__name__}) does not multiply by its weight, nor by 1 + its weight")


def norm_gain(norm: Any, name: str) -> Tensor:
    """The factor of each channel [N]."""
    return norm.weight.detach().float() + norm_offset(norm, name)
