"""Nothing but the bits, the scales and the zero points that the scheme says: on disk, in memory, and on kernels."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.runtime.sizes import SCHEMES, bytes_on_kernels, converted, file_bytes, held_bytes, ideal_bytes

WITHIN = 0.02


def llama() -> nn.Module:
    """Wide enough that padding is no matter, with so small a vocabulary that it hides nothing."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 64, "tie_word_embeddings": True, "eos_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_file_and_memory_are_what_the_bits_cost(scheme: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(1))
    floats, model = llama(), converted(llama(), scheme, ids)
    ideal, logits = ideal_bytes(floats, model), model(ids).logits
    sizes = {"file": file_bytes(model, tmp_path), "reference": held_bytes(model)} | bytes_on_kernels(model, ids)
    over = {what: size / ideal - 1 for what, size in sizes.items()}
    assert all(abs(part) <= WITHIN for part in over.values()), over
    assert torch.equal(model(ids).logits, logits) and held_bytes(model) == sizes["reference"]


def test_the_schemes_that_have_kernels_are_measured_on_them() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert set(bytes_on_kernels(converted(llama(), "w4a16", ids), ids)) == {"int4_cpu"}
    assert {"int8_mm"} <= set(bytes_on_kernels(converted(llama(), "w8a8", ids), ids))


def test_what_is_held_is_found_wherever_it_hangs() -> None:
    layer = nn.Linear(8, 8, bias=False)
    assert held_bytes(layer) == 256
    layer.extra = {"lists": [torch.zeros(10)], "again": layer.weight}
    assert held_bytes(layer) == 256 + 40
    layer.view = torch.zeros(100)[:1]
    assert held_bytes(layer) == 256 + 40 + 400
