"""AdaRound: its gradient against autograd on the paper's formula in float64, and what it is worth."""

from __future__ import annotations

import pytest
import torch

from tests.algorithms.test_gptq import loss, problem
from wrapq.algorithms.adaround import AdaRound, gradient
from wrapq.algorithms.rtn import RTN
from wrapq.quant.spec import QuantSpec


@pytest.mark.parametrize(("regularizer", "beta"), [(0.0, 20.0), (0.3, 20.0), (2.0, 2.5)])
def test_the_gradient_is_that_of_the_papers_loss(regularizer, beta):
    """Equations 21 to 24 written out on samples, |W X - W~ X|^2 and not the trace form."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((5, 12), (12, 40)))
    scale = torch.rand(5, 1, dtype=torch.float64, generator=generator).expand(5, 12) + 0.3
    zero = torch.full_like(scale, 1.0)
    v = torch.randn(5, 12, dtype=torch.float64, generator=generator).mul_(2).requires_grad_()
    h = torch.clamp(torch.sigmoid(v) * 1.2 - 0.1, 0, 1)
    rounded = scale * (torch.clamp(torch.floor(weight / scale) + h + zero, -4, 3) - zero)
    cost = (weight @ x - rounded @ x).square().sum() + regularizer * (1 - (2 * h - 1).abs().pow(beta)).sum()
    (expected,) = torch.autograd.grad(cost, v)
    below = torch.floor(weight / scale)
    got = gradient(v.detach(), weight, below, scale, zero, x @ x.t(), (-4, 3), regularizer, beta)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def row_losses(weight, rounded, statistics):
    difference = rounded.qparams.dequantize(rounded.integers, torch.float64) - weight.double()
    return ((difference @ statistics.sums["hessian"].double()) * difference).sum(1)


@pytest.mark.parametrize(
    "text", ["int4:g16:sym", "int3:channel:sym", "uint4:g32:asym", "int4:b4x16", "int3:g16:signed"]
)
def test_no_row_is_worse_than_rounded_to_nearest_and_the_whole_is_much_better(text):
    spec, (weight, statistics) = QuantSpec.parse(text), problem(16, 32)
    made = AdaRound(AdaRound.Options(iterations=150))
    nearest, learned = (a.round(weight, spec, "w", statistics) for a in (RTN(), made))
    before, after = (row_losses(weight, rounded, statistics) for rounded in (nearest, learned))
    assert bool((after <= before * 1.0001).all())
    assert loss(weight, learned, statistics) < 0.75 * loss(weight, nearest, statistics)
    moved = (learned.integers.int() - nearest.integers.int()).abs()
    assert int(moved.max()) == 1  # up or down, and no further


def test_the_same_problem_has_the_same_bits():
    spec, (weight, statistics) = QuantSpec.parse("int3:g16:sym"), problem(8, 32)
    made = AdaRound(AdaRound.Options(iterations=30))
    first, second = (made.round(weight, spec, "w", statistics).integers for _ in range(2))
    assert torch.equal(first, second)


def test_uneven_grids_are_refused():
    assert "evenly" in AdaRound().unsupported(QuantSpec.parse("nf4:g16"))
    assert "integer zero" in AdaRound().unsupported(QuantSpec.parse("int4:g16:asym:zero=float"))
