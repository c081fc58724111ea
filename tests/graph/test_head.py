"""Logits made part by part are those that are made at once, for whatever a family does after its body."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from wrapq.graph import head as head_module
from wrapq.graph.head import Head

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 97,
}
FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},  # tanh behind the head
    "gemma3_text": {},
    "cohere": {"logit_scale": 0.3, "pad_token_id": 0},
    "granite": {"logits_scaling": 7.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "pad_token_id": 0},  # a projection before the head
    "gpt_neox": {},
    "bloom": {"n_layer": 2, "n_head": 2},
    "mamba": {},
}


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | FAMILIES[family])).eval()


def joined(head: Head, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    hidden = head.hidden(ids, mask)
    return torch.cat([head.logits(hidden, part) for part in head.parts(ids.shape)], 1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_parts_are_the_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, mask = model_of(family), torch.randint(1, 90, (3, 11)), torch.ones(3, 11, dtype=torch.bool)
    mask[1, 7:] = False
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    head = Head(model)
    assert torch.equal(joined(head, ids, mask), whole)  # few of them are made at once
    widest = 0
    linear = model.get_output_embeddings()

    def watch(module: nn.Module, args: object, output: Tensor) -> None:
        nonlocal widest
        widest = max(widest, output.shape[1])

    linear.register_forward_hook(watch)
    monkeypatch.setattr(head_module, "ELEMENTS", 1000)
    hidden = head.hidden(ids, mask)
    parts = list(head.parts(ids.shape, elements=1000))
    assert len(parts) == 4 and [b.start for b in parts[1:]] == [a.stop for a in parts[:-1]]
    found = torch.cat([head.logits(hidden, part) for part in parts], 1)
    assert torch.allclose(found[mask], whole[mask], rtol=1e-4, atol=1e-5)
    assert widest <= 3 or family == "opt", "OPT calls its decoder past its body, so that it is run whole"


@torch.no_grad()
def test_a_head_that_looks_at_other_positions_is_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of("llama"), torch.randint(1, 90, (2, 9))
    model.lm_head = nn.Sequential(_Mixing(), model.lm_head)
    whole = model(input_ids=ids, use_cache=False).logits
    monkeypatch.setattr(head_module, "ELEMENTS", 100)
    assert torch.equal(joined(Head(model), ids), whole)


class _Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


def test_parts_overlap_and_leave_nothing_out() -> None:
    head = Head(model_of("llama"))
    parts = list(head.parts(torch.Size((2, 30)), overlap=1, elements=2 * 97 * 4))
    covered = [position for part in parts for position in range(part.start, part.stop - 1)]
    assert covered == list(range(29)) and all(b.start == a.stop - 1 for a, b in pairwise(parts))
    assert list(head.parts(torch.Size((2, 30)))) == [slice(0, 30)]
