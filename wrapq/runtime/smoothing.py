"""Smoothing at each forward, for tensors whose maker cannot take the factors into its weights."""

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


class KeySmoothing(nn.Module):
    """Keys `(k - mean) / factors`, and queries `q * factors`: all scores of a query move by one number, which softmax
    does not see.

    Attributes:
        mean, factors: float32 [H_kv, D], of each head of the keys; the queries that read it share its factors.
    """

    mean: Tensor
    factors: Tensor

    def __init__(self, mean: Tensor | None = None, factors: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("factors", factors)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """`query` [B, H, T, D] and `key` [B, H_kv, S, D] smoothed."""
        mean, factors = self.mean[:, None], self.factors[:, None]
        own = factors.repeat_interleave(query.shape[1] // key.shape[1], 0)
        return (query * own).to(query.dtype), ((key - mean) / factors).to(key.dtype)

    def extra_repr(self) -> str:
        return "{} heads of {} channels".format(*self.factors.shape)


def smooth_inputs(module: nn.Module) -> Any:
    """Let `module`, which holds a smoothing, divide the first argument of its forward; returns the handle that ends it.
    It is a hook for the reason that `wrapq.runtime.rotation.rotate_inputs` is one."""
    return module.register_forward_pre_hook(_smoothed)


def _smoothed(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module._modules[SMOOTHING](args[0]), *args[1:])
