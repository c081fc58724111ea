"""Attention of every transformers family that dispatches through the library's attention interface.

The interface hands a registered function the module, query, key and value after position encoding and after the cache;
the function here runs the module's points on them. No family needs code of its own, and masks come from the caller:
none is stored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wrapq.errors import ModelError
from wrapq.observers.forward_context import in_context
from wrapq.runtime.rotation import ONLINE
from wrapq.runtime.smoothing import SMOOTHING
from wrapq.wrappers.base import Point, Wrapper
from wrapq.wrappers.wrapper_registry import WRAPPERS

IMPLEMENTATION = "wrapq"
"""The name under which the function is registered with transformers."""

_WATCH = "watch_scores"
_HEADS_FIRST = 2  # tokens are dimension 2 of [B, H, T, D]


@WRAPPERS.register("transformers attention interface")
class Attention(Wrapper):
    """Scaled dot-product attention with all its tensors as points.

    `query`, `key` and `value` are [B, H, T, D] after position encoding, `key` and `value` as the cache holds them,
    `query` and `key` smoothed and rotated where that is done online; `scores` [B, H, T, S] before the mask is added,
    `probs` after softmax, `context` [B, T, H, D] their product with value.
    """

    kind = "Attention"
    config: Any
    points = (
        *(Point(name, fixed_axes=(-1, -3)) for name in ("query", "key", "value")),
        *(Point(name, fixed_axes=(-3,)) for name in ("scores", "probs")),
        Point("context", fixed_axes=(-1, -2)),
    )

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        use_attention_points(self.config)  # the process that unpickles it may not know the function

    @staticmethod
    def matches(module: nn.Module) -> bool:  # type: ignore[override]
        """Whether the module's forward looks its attention function up in transformers' interface."""
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names

    @classmethod
    def width(cls, module: nn.Module, point: str) -> int | None:
        size = getattr(module, "head_dim", getattr(module, "attention_head_size", None))
        return size if isinstance(size, int) and point not in ("scores", "probs") else None


def use_attention_points(config: Any) -> None:
    """Make the modules of a transformers model with this `config` run the function here; idempotent."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention_forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, eager_mask)
    config._attn_implementation = IMPLEMENTATION


@contextmanager
def watched(module: Any, watch: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """While this holds, `watch` sees the queries [B, H, T, D] and keys [B, H_kv, S, D] of a float attention."""
    before = module.config._attn_implementation
    use_attention_points(module.config)
    module.__dict__[_WATCH] = watch
    try:
        yield
    finally:
        del module.__dict__[_WATCH]
        module.config._attn_implementation = before


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention through the points of `module`; the library's own where the module has none.

    Args:
        query: [B, H, T, D]; key and value: [B, H_kv, S, D].
        attention_mask: additive, [B, 1, T, S].

    Returns:
        The context [B, T, H, D] and the probabilities [B, H, T, S].
    """
    if (watch := module.__dict__.get(_WATCH)) is not None:
        watch(query, key)
    if not isinstance(module, Attention) and softcap is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        terms = {"dropout": dropout, "scaling": scaling, "position_bias": position_bias, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **terms)
    if kwargs.get("s_aux") is not None:
        raise ModelError(f"{type(module).__name__} uses attention sinks, which the attention points do not cover")
    q: Callable[..., Tensor] = module.q if isinstance(module, Attention) else lambda point, x, token_dim=1: x
    if isinstance(module, Attention) and (smooth := module._modules.get(SMOOTHING)) is not None:
        query, key = smooth(query, key)
    if isinstance(module, Attention) and (rotate := module._modules.get(ONLINE)) is not None:
        query, key = rotate(query), rotate(key)
    repeat = query.shape[1] // key.shape[1]
    key, value = q("key", key, _HEADS_FIRST), q("value", value, _HEADS_FIRST)
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    query = q("query", query, _HEADS_FIRST)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None:
        scores = q("scores", scores, _HEADS_FIRST)
    else:
        hidden = attention_mask < 0
        scores = scores.masked_fill(hidden, 0.0)  # what a dynamic range must not see either; zero is in every range
        with _visible(scores, hidden):
            scores = q("scores", scores, _HEADS_FIRST)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    for term in (position_bias, attention_mask):
        scores = scores if term is None else scores + term
    probs = q("probs", scores.softmax(-1, dtype=torch.float32).to(query.dtype), _HEADS_FIRST)
    probs = nn.functional.dropout(probs, p=dropout, training=module.training)
    return q("context", (probs @ value).transpose(1, 2).contiguous()), probs


def _visible(scores: Tensor, hidden: Tensor) -> AbstractContextManager[None]:
    """While this holds, only scores [B, H, T, S] that are not `hidden` enter a statistic.

    A mask with heads of its own says nothing here: what it hides counts as zero.
    """
    shared = hidden.dim() == len(scores.shape) and hidden.shape[1] == 1
    batch, _, queries, keys = scores.shape
    return in_context(visible=~hidden[:, 0].expand(batch, queries, keys) if shared else None)
