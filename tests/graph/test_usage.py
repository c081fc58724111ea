"""What a forward on the meta device says of a model's modules is what a real forward does with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.conftest import FAMILIES, build_model
from wrapq.graph.usage import find_initialized, find_usage
from wrapq.wrappers.experts import apart
from wrapq.wrappers.wrapper_registry import WRAPPERS

IDS = torch.arange(3, 9)[None]
ALONE = {"mamba": "mixer.dt_proj", "bart": "encoder_attn.", "longcat_flash": "router.classifier"}
"""Of families that call not all of their modules, a part of the names of those that they do not."""


def called_in(model: nn.Module, names: list[str]) -> set[str]:
    found = set[str]()
    hooks = [model.get_submodule(n).register_forward_hook(lambda *_, name=n: found.add(name)) for n in names]
    model(input_ids=IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def wrapped_in(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if not isinstance(m, nn.ModuleList) and WRAPPERS.find(m)]


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3", "recurrent_gemma", "bart", "mamba"])
def test_as_in_a_real_forward(family: str) -> None:
    model = build_model(family)
    names, classes = wrapped_in(model), [type(m) for m in model.modules()]
    called = called_in(model, names)
    usage = find_usage(model.to("meta"), names)
    assert usage is not None and usage.called == called
    assert [type(m) for m in model.modules()] == classes and not any(m._forward_hooks for m in model.modules())
    left = set(names) - called
    assert any(ALONE[family] in name for name in left) if family in ALONE else not left
    assert ("mixer.dt_proj" in str(usage.read)) == (family == "mamba")


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "llama4", "longcat_flash"])
def test_the_first_expert_stands_for_all(family: str) -> None:
    model = build_model(family).to("meta")
    with apart(model):
        names = wrapped_in(model)
        usage = find_usage(model, names)
    assert usage is not None
    assert {name.rpartition("router.")[2] for name in set(names) - usage.called} <= {"classifier"}


def test_a_model_that_asks_for_values_says_nothing() -> None:
    assert find_usage(build_model("jetmoe").to("meta"), ["lm_head"]) is None


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        ("gpt_bigcode", {"attn.c_proj", "mlp.c_proj"}),
        ("mamba", {"mixer.dt_proj", "mixer.out_proj"}),
        ("recurrent_gemma", {""}),  # all
        ("llama", set()),
        ("qwen3", set()),
        ("gemma2", set()),
    ],
)
def test_whose_weight_is_initialized_before_it_is_filled(family: str, ends: set[str]) -> None:
    model = build_model(family).to("meta")
    packed = {n: None for n in wrapped_in(model) if isinstance(model.get_submodule(n), nn.Linear) and n != "lm_head"}
    found = find_initialized(model, packed)
    assert found == {name for name in packed if name.endswith(tuple(ends))} if ends else not found
