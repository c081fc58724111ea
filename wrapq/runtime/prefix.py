"""First tokens whose activations stay float.

A language model stores in its first tokens what all others look at without heeding it, and their states are like no
other token's. Their keys and values depend on nothing that follows, so that they can be computed once, in float, and
kept: Liu et al., "IntactKV: Improving Large Language Model Quantization by Keeping Pivot Tokens Intact",
arXiv:2403.01241, section 3. Here no point quantizes the tensors of these tokens, which gives the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = "float_prefix"
"""The attribute under which a model's body holds how many tokens it is."""

CACHES = ("cache", "past_key_values")
"""What transformers calls the argument of a forward that keeps keys and values: since 5.20, and before."""


@dataclass(frozen=True)
class Prefix:
    """Which positions of the forward that runs belong to the prefix.

    Attributes:
        positions: mask [B, S] of all positions, those in a cache before the T that run now.
        length: T.
    """

    positions: Tensor
    length: int

    @cached_property
    def runs(self) -> bool:
        """Whether one of its tokens is among those that run now, and not all are in the cache."""
        return bool(self.positions[:, -self.length :].any())

    def mask_of(self, x: Tensor, token_dim: int) -> Tensor | None:
        """The mask of the prefix in `x`, whose tokens lie along `token_dim`, of a shape that goes with it; None for a
        tensor that does not have a row for each token, such as those that a mixture sends to one expert. A tensor of
        fewer positions than there are, as a sliding window keeps, has the last."""
        batch, positions = self.positions.shape
        if x.dim() == 2 and x.shape[0] == batch * self.length:
            return self.positions[:, -self.length :].reshape(-1, 1)
        if x.dim() <= max(token_dim, 1) or x.shape[0] != batch or not 0 < x.shape[token_dim] <= positions:
            return None
        shape = [1] * x.dim()
        shape[0], shape[token_dim] = batch, x.shape[token_dim]
        return self.positions[:, -x.shape[token_dim] :].reshape(shape)


_CURRENT: ContextVar[Prefix | None] = ContextVar("float_prefix", default=None)
_kept = False
"""Whether any model of this process has a prefix: a compiler stops at a context variable, so it is asked only then."""


def current_prefix() -> Prefix | None:
    """That of the forward that calls this; None where all tokens are quantized."""
    return _CURRENT.get() if _kept else None


def outside_prefix(x: Tensor, quantize: Callable[[Tensor], Tensor], token_dim: int = 1) -> Tensor:
    """`x` quantized, but for the tokens of the prefix, which also have no part in ranges taken from `x`."""
    prefix = current_prefix()
    mask = None if prefix is None else prefix.mask_of(x, token_dim)
    return quantize(x) if mask is None else torch.where(mask, x, quantize(x.masked_fill(mask, 0)))


def keep_prefix(model: nn.Module, tokens: int) -> None:
    """Let the first real `tokens` of every sequence that goes through a language `model` stay float."""
    global _kept
    _kept = True
    body: Any = getattr(model, "base_model", model)
    signature = inspect.signature(body.forward)
    body.__dict__[TOKENS] = tokens

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        given |= given.get("kwargs", {})
        ids = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        (batch, length), mask = ids.shape[:2], given.get("attention_mask")
        count = length + (0 if cache is None else int(cache.get_seq_length()))
        real = torch.ones(batch, count, dtype=torch.bool, device=ids.device)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask[:, :count].bool()
        _CURRENT.set(Prefix(real & (real.cumsum(1) <= tokens), length))

    body.register_forward_pre_hook(enter, with_kwargs=True)
    body.register_forward_hook(lambda *_: _CURRENT.set(None) and None, always_call=True)


def prefix_tokens(model: nn.Module) -> int:
    """How many first tokens stay float in a model."""
    return int(getattr(model, "base_model", model).__dict__.get(TOKENS, 0))
