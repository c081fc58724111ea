"""The architectures that llama.cpp runs as transformers does, and what of a configuration it has to be told.

What each of them fixes is in llama.cpp's `src/models`; how its files are made, in `conversion`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp makes of a class of models.

    Attributes:
        name: its name there.
        fixed: keys of the configuration that it does not read, and the values for which it is right; false stands for
            None and for a key that is not there.
        interleaved: rotary embeddings turn neighbouring rows of queries and keys, not rows of the two halves.
        shifted_norms: transformers adds one to the weights of norms.
        windows: it knows layers that look back over a window only.
        square: queries are as wide as the hidden state.
    """

    name: str
    fixed: Mapping[str, object] = field(default_factory=lambda: {"hidden_act": "silu", "attention_bias": False})
    interleaved: bool = False
    shifted_norms: bool = False
    windows: bool = False
    square: bool = False


_LLAMA = Architecture("llama", {"hidden_act": "silu"}, interleaved=True)
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "use_bidirectional_attention": False}
ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", square=True),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Gemma2ForCausalLM": Architecture("gemma2", _GEMMA, shifted_norms=True, windows=True),
    "Gemma3ForCausalLM": Architecture(
        "gemma3", {**_GEMMA, "attn_logit_softcapping": False}, shifted_norms=True, windows=True
    ),
    "Phi3ForCausalLM": Architecture("phi3", square=True),
    "GPT2LMHeadModel": Architecture(
        "gpt2",
        {"activation_function": "gelu_new", "scale_attn_weights": True}
        | dict.fromkeys(("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"), False),
    ),
}
"""By the names of transformers' classes."""
_LARGEST_GEMMAS = {"gemma2": 46, "gemma3": 62}
"""Layers of those whose queries llama.cpp scales by the width of the hidden state."""
_ROTATIONS = ("default", "linear", "llama3")


def why_not(config: Any, architecture: Architecture) -> Iterator[str]:
    """What in a model's configuration llama.cpp would compute otherwise."""
    name = architecture.name
    for key, value in architecture.fixed.items():
        if (getattr(config, key, None) or False) != value:
            yield f"llama.cpp's {name} has {key} {value}, not {getattr(config, key, None)}"
    for kind, rope in _rotations(config).items():
        if (rope_type := rope.get("rope_type", "default")) not in _ROTATIONS:
            yield f"rotary embeddings of type {rope_type} are not written; of type {', '.join(_ROTATIONS)} they are"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            yield f"rotary embeddings of a part of each head are not written ({kind or 'partial_rotary_factor'})"
    if architecture.square and _head_dim(config) * config.num_attention_heads != config.hidden_size:
        yield f"llama.cpp's {name} has heads that are together as wide as the hidden state"
    if name in _LARGEST_GEMMAS:
        large = config.num_hidden_layers == _LARGEST_GEMMAS[name]
        scalar = config.hidden_size // config.num_attention_heads if large else config.head_dim
        if config.query_pre_attn_scalar != scalar:
            given = config.query_pre_attn_scalar
            yield f"llama.cpp's {name} divides queries by the root of {scalar}, and query_pre_attn_scalar is {given}"


def window(config: Any) -> int | None:
    """Over how many tokens some layers look back; None where all layers see all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def context_length(config: Any, architecture: Architecture) -> int:
    """How many tokens llama.cpp may read at once: no more than a window that it does not know of."""
    most: int = config.max_position_embeddings
    return most if architecture.windows else min(most, window(config) or most)


def write_facts(writer: Any, config: Any, architecture: Architecture) -> None:
    """Tell a `GGUFWriter` what llama.cpp has to know of a model of `config`."""
    heads, width = config.num_attention_heads, config.hidden_size
    writer.add_context_length(context_length(config, architecture))
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    if architecture.name == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * width)
        writer.add_head_count_kv(heads)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture.windows and (tokens := window(config)):
        writer.add_sliding_window(tokens)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if cap := getattr(config, key, None):
            getattr(writer, f"add_{key}")(cap)
    rotations = _rotations(config)
    if rotations:
        for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
            add(_head_dim(config))
        _write_rotation(writer, rotations.get("full_attention") or rotations[""])
    if local := rotations.get("sliding_attention"):
        writer.add_rope_freq_base_swa(local["rope_theta"])


def _write_rotation(writer: Any, rope: Mapping[str, Any]) -> None:
    from gguf import RopeScalingType

    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rotations(config: Any) -> dict[str, Mapping[str, Any]]:
    """The rotary embeddings of each kind of layer, or under the empty name those of all; none for a model without."""
    found = getattr(config, "rope_parameters", None) or {}
    return found if any(isinstance(each, Mapping) for each in found.values()) else {"": found} if found else {}


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def file_rows(name: str, config: Any, architecture: Architecture) -> Tensor | None:
    """Which row of the parameter `name` each row in the file is, int64 [N]; None where they stay where they are.

    transformers turns row i of a head together with row i + D / 2, and llama.cpp's llama row 2i with row 2i + 1.
    """
    kind = name.rpartition(".")[0].rpartition(".")[2]
    if not architecture.interleaved or kind not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
    return torch.arange(heads * _head_dim(config)).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def float_matrix(name: str, module: nn.Module, parameter: Tensor, architecture: Architecture) -> Tensor:
    """A float parameter as llama.cpp has it: GPT-2's weights [K, N] as [N, K], Gemma's norms with their one."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D) and parameter.dim() > 1:
        return parameter.t()
    return parameter.float() + 1 if architecture.shifted_norms and name.endswith("norm.weight") else parameter


def extra_tensors(config: Any) -> Iterable[tuple[str, Tensor]]:
    """What llama.cpp keeps as tensors of what transformers computes from a configuration: by how much each frequency of
    Llama 3.1's rotary embeddings is divided."""
    rope = _rotations(config).get("", {})
    if rope.get("rope_type") == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(0, _head_dim(config), 2).float() / _head_dim(config))
        yield "rope_freqs.weight", plain / scaled
