"""Smoothing at each forward, for inputs whose maker cannot take the factors into its weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

SMOOTHING = "smoothing"
"""The name under which a module holds what it divides its input by."""


class InputSmoothing(nn.Module):
    """`x / factors` for x [..., K], the weight behind it having been multiplied by `factors` [K]."""

    factors: Tensor

    def __init__(self, factors: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("factors", factors)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., K] with its channels divided."""
        return (x / self.factors).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.factors)} channels"


def smooth_inputs(module: nn.Module) -> Any:
    """Let `module`, which holds a smoothing, divide the first argument of its forward; returns the handle that ends it.
    It is a hook for the reason that `wrapq.runtime.rotation.rotate_inputs` is one."""
    return module.register_forward_pre_hook(_smoothed)


def _smoothed(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module._modules[SMOOTHING](args[0]), *args[1:])
