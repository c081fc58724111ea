"""Llama-like blocks: the gated product of the MLP and the residual sums of the layer.

Llama, Mistral, Qwen2, Qwen3 and the families copied from them share these forwards to the letter, which is how the
registry recognises them; a family whose forward says anything else is left alone and listed as untouched.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from wrapq.wrappers.base import INPUT, OUTPUT, Point, Wrapper
from wrapq.wrappers.wrapper_registry import WRAPPERS


@WRAPPERS.register("transformers.models.llama.modeling_llama.LlamaMLP")
class GatedMLP(Wrapper):
    """`down(act(gate(x)) * up(x))`; `mul` is the gated product."""

    kind = "MLP"
    points = (INPUT, Point("mul"), OUTPUT)
    replaces_forward = True
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    @classmethod
    def width(cls, module: nn.Module, point: str) -> int | None:
        return getattr(module.gate_proj, "out_features" if point == "mul" else "in_features", None)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, T, K] to [B, T, K]."""
        x = self.q("input", x)
        return self.q("output", self.down_proj(self.q("mul", self.act_fn(self.gate_proj(x)) * self.up_proj(x))))


@WRAPPERS.register("transformers.models.llama.modeling_llama.LlamaDecoderLayer")
class DecoderLayer(Wrapper):
    """Two residual branches around normalized attention and MLP; the sums are `attention_add` and `mlp_add`."""

    kind = "DecoderLayer"
    points = (INPUT, Point("attention_add"), Point("mlp_add"))
    replaces_forward = True
    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    @classmethod
    def width(cls, module: nn.Module, point: str) -> int | None:
        weight = getattr(module.input_layernorm, "weight", None)
        return None if weight is None else weight.shape[-1]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`hidden_states` [B, T, K] to [B, T, K]; everything else goes to the attention."""
        residual = self.q("input", hidden_states)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(residual), *args, **kwargs)  # noqa: B026
        residual = self.q("attention_add", residual + attended)
        return self.q("mlp_add", residual + self.mlp(self.post_attention_layernorm(residual)))
