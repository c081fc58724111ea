"""Experts and routers are recognised by what their modules hold and by the names of experts that are modules."""

from __future__ import annotations

import pytest
from torch import nn

from tests.conftest import build_model
from wrapq.graph.mixtures import EXPERT_NAME, find_routers, is_fused_experts, is_router
from wrapq.wrappers.experts import apart, take_apart

ROUTERS = {
    "llama4": "router",
    "phimoe": "router",
    "afmoe": "router.gate",
    "longcat_flash": "router.classifier",
    "hunyuan_v1_moe": "gate.wg",
    "jetmoe": "router.layer",
    "dbrx": "router.layer",
}
"""How linears that choose among experts are called in families where they are linears."""


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_experts_and_the_router_of_a_model_are_found_and_nothing_else(family: str) -> None:
    modules = dict(build_model(family).named_modules())
    assert {n.rpartition(".")[2] for n, m in modules.items() if is_fused_experts(m)} == {"experts"}
    assert {n.rpartition(".")[2] for n, m in modules.items() if is_router(m)} == {"gate"}


def test_names_of_experts_that_are_modules_have_the_experts_and_the_part() -> None:
    linears = [n for n, m in take_apart(build_model("mixtral")).named_modules() if isinstance(m, nn.Linear)]
    parts = [match.groups() for name in linears if (match := EXPERT_NAME.fullmatch(name))]
    assert {layer for layer, _ in parts} == {f"model.layers.{i}.mlp.experts" for i in range(2)}
    assert {part for _, part in parts} == {"gate_proj", "up_proj", "down_proj"}
    assert EXPERT_NAME.fullmatch("model.layers.0.mlp.shared_experts.0.up_proj") is None


@pytest.mark.parametrize("family", ROUTERS)
def test_a_linear_that_chooses_among_experts_is_a_router_whatever_its_class(family: str) -> None:
    model = build_model(family)
    found = set(find_routers(model))
    with apart(model):
        assert set(find_routers(model)) == found
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert found == {name for name in linears if name.endswith(ROUTERS[family])} and found


@pytest.mark.parametrize("family", ["llama", "recurrent_gemma", "mixtral", "qwen2_moe", "nemotron_h"])
def test_linears_of_other_models_are_no_routers(family: str) -> None:
    model = build_model(family)
    assert not list(find_routers(model))
    with apart(model):
        assert not list(find_routers(model))


def test_the_router_of_experts_in_a_list_is_found_and_what_lies_outside_the_mixture_is_not() -> None:
    layer = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), "gate": nn.Linear(8, 3)})
    assert list(find_routers(nn.Sequential(nn.Linear(8, 3), layer))) == ["1.gate"]
