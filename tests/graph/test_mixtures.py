"""Experts and routers are recognised by what their modules hold and by the names of experts that are modules."""

from __future__ import annotations

import pytest
from torch import nn

from tests.conftest import build_model
from wrapq.graph.mixtures import EXPERT_NAME, is_fused_experts, is_router
from wrapq.wrappers.experts import take_apart


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
