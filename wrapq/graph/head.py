"""The logits of a language model, a part of the positions at a time: of a large vocabulary all of them together take
many times the memory of the model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from wrapq.graph.blocks import find_blocks, giving, input_hidden_states, replaced_forward
from wrapq.half_products import in_products

ELEMENTS = 1 << 26
"""Logits that are made at once where there are more: 128 MiB in bfloat16, and enough rows to keep a CPU busy."""
_TRIED = 3  # tokens
_ROUNDING = 0.02  # of the norm, in the coarsest dtype; what more than a position's own states decide moves more


class Head:
    """What makes logits of the last hidden states of a causal language model: all that comes after its body.

    A model that has no body of its own, or whose logits are more than a function of each position's hidden states, is
    run whole, and its logits are cut afterwards; so is one whose logits are few.

    Args:
        model: as transformers has them, wrapped and converted ones too; its blocks need not be in memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._body: nn.Module = getattr(model, "base_model", model)
        config = getattr(model, "config", None)
        self._vocabulary: int = getattr(config.get_text_config(), "vocab_size", None) or 0 if config is not None else 0

    def hidden(self, ids: Tensor, mask: Tensor | None = None) -> Any:
        """What token ids [B, T] become before the head, or the whole model's output; to be handed to `logits`."""
        many = ids.numel() * self._vocabulary > ELEMENTS and self._is_apart
        return (self._body if many else self.model)(input_ids=ids, attention_mask=mask, use_cache=False)

    def logits(self, hidden: Any, positions: slice = slice(None)) -> Tensor:
        """The logits [B, t, V] at some of the positions."""
        if "logits" in hidden:
            return hidden.logits[:, positions]
        states = hidden.last_hidden_state[:, positions].contiguous()  # else a product takes 20 times as long
        with replaced_forward({self._body: giving(type(hidden)(last_hidden_state=states))}), in_products():
            ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
            return self.model(input_ids=ids, use_cache=False).logits

    def parts(self, shape: torch.Size, overlap: int = 0, elements: int = ELEMENTS) -> Iterator[slice]:
        """The positions of [B, T] tokens in parts that have about `elements` logits, each of which begins `overlap`
        positions before the one before it ends."""
        rows, length = shape
        size = max(1, elements // max(1, rows * self._vocabulary))
        if size + overlap >= length:
            yield slice(0, length)
            return
        for start in range(0, length - overlap, size):
            yield slice(start, min(start + size + overlap, length))

    @cached_property
    @torch.no_grad()
    def _is_apart(self) -> bool:
        """Whether body and head, each called by itself, give what the model gives; blocks that are not in memory do
        nothing then."""
        if self._body is self.model:
            return False
        blocks = [self.model.get_submodule(name) for name in find_blocks(self.model).names()]
        absent = [block for block in blocks if any(p.is_meta for p in block.parameters())]
        device = next(p.device for p in self.model.parameters() if not p.is_meta)
        ids = torch.arange(_TRIED, device=device)[None]
        with replaced_forward(dict.fromkeys(absent, _pass)):
            try:
                whole = self.model(input_ids=ids, use_cache=False).logits.float()
                hidden = self._body(input_ids=ids, attention_mask=None, use_cache=False)
                apart = torch.cat([self.logits(hidden, part) for part in (slice(0, 1), slice(1, _TRIED))], 1).float()
                return bool((whole - apart).norm() <= _ROUNDING * whole.norm())
            except Exception:  # a body that is called otherwise, or gives something else
                return False


def _pass(*args: Any, **kwargs: Any) -> Tensor:
    return input_hidden_states(args, kwargs)
