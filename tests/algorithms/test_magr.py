"""MagR: the proximal step and the descent against their definitions; the model changes a little, and no more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.algorithms.transforming import outputs_moved
from tests.conftest import KINDS, build_model
from wrapq.algorithms.magr import MagR, MagROptions, reduce_magnitude, shrink_largest


@pytest.mark.parametrize("amount", [0.01, 0.5, 100.0])
def test_the_proximal_step_is_the_least_of_its_definition(amount: float) -> None:
    rows = torch.randn(3, 9, dtype=torch.float64)

    def cost(tried: Tensor) -> Tensor:
        return 0.5 * (tried - rows).square().sum(1) + amount * tried.abs().amax(1)

    found, level = shrink_largest(rows, amount)
    again, same = shrink_largest(rows, amount, level + 0.3)
    torch.testing.assert_close((again, same), (found, level))
    levels = torch.linspace(0, 4, 4001, dtype=torch.float64)  # the least is a clip at some level
    every = torch.stack([cost(rows.clamp(-level, level)) for level in levels])
    assert bool((cost(found) <= every.amin(0) + 1e-9).all())
    for _ in range(200):
        assert bool((cost(found) <= cost(found + 1e-3 * torch.randn_like(found)) + 1e-12).all())


def test_the_descent_ends_where_the_problem_is_solved() -> None:
    x = torch.randn(200, 8, dtype=torch.float64)
    hessian = x.t() @ x
    hessian /= torch.linalg.eigvalsh(hessian)[-1]
    weight = torch.randn(4, 8, dtype=torch.float64)

    def cost(tried: Tensor) -> Tensor:
        moved = tried - weight
        return 0.5 * ((moved @ hessian) * moved).sum(1) + 0.2 * tried.abs().amax(1)

    found = reduce_magnitude(weight, hessian * 7, 0.2, 3000)
    assert bool((found.abs().amax(1) < weight.abs().amax(1)).all())
    for size in (1e-1, 1e-2, 1e-3, 1e-4):
        for _ in range(200):
            assert bool((cost(found) <= cost(found + size * torch.randn_like(found)) + 1e-10).all())


@pytest.mark.parametrize("family", [*KINDS, "gemma3", "mixtral"])
def test_every_family_changes_a_little(family: str, token_batches: list[Tensor]) -> None:
    model = build_model(family)
    sizes = {name: p.detach().abs().amax().item() for name, p in model.named_parameters()}
    change, found = outputs_moved(model, [MagR(MagROptions(alpha=0.01, iterations=20))], token_batches)
    assert len(found[0].names) >= 6
    assert 1e-4 < change < MagR.tolerance
    for name in found[0].names:
        assert model.get_submodule(name).weight.abs().amax() <= sizes[f"{name}.weight"]
