"""Coordinate descent: against a literal one in float64, and what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.algorithms.test_gptq import problem
from wrapq.algorithms.columns import spread
from wrapq.algorithms.descent import descend
from wrapq.algorithms.gptq import GPTQ, GPTQOptions
from wrapq.observers.base import observe_tensor
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.input import InputStatistics

SPECS = ["int4:g16:sym", "int3:channel:sym", "uint4:g32:asym", "int2:g16:sym:signed:mse", "uint4:g16:asym:zero=float"]
SPECS += ["nf4:g16", "mxfp4", "nvfp4", "int4:b8x16", "int4:channel@1"]


def grid_of(qparams: QParams, shape: torch.Size) -> Tensor:
    """For each element [N, K] all the numbers that its codes may stand for, in float64."""
    dtype = qparams.spec.dtype
    levels = torch.tensor([v for v in dtype.values() if math.isfinite(v)], dtype=torch.float64)
    scale = spread(qparams.effective_scale, shape, qparams.spec).double()
    zero = 0.0 if qparams.zero_point is None else spread(qparams.zero_point, shape, qparams.spec).double()[..., None]
    return (levels - zero) * scale[..., None]


def literal(weight: Tensor, qparams: QParams, codes: Tensor, hessian: Tensor, sweeps: int) -> Tensor:
    """The numbers after `sweeps`, each the best of its grid with all others as they are."""
    h, w, grid = hessian.double(), weight.double(), grid_of(qparams, weight.shape)
    q = qparams.dequantize(codes, torch.float32).double()
    for j in list(range(weight.shape[1])) * sweeps:
        best = q[:, j] - ((q - w) @ h[:, j]) / h[j, j]
        nearest = (grid[:, j] - best[:, None]).abs().argmin(1)
        q[:, j] = grid[:, j].gather(1, nearest[:, None])[:, 0]
    return q


def lost(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    d = values.double() - weight.double()
    return float(((d @ hessian.double()) * d).sum())


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("sweeps", [1, 3])
def test_it_is_that_of_the_paper(text: str, sweeps: int) -> None:
    weight, statistics = problem(columns=160)
    hessian, spec = statistics.get("hessian", "w"), QuantSpec.parse(text)
    qparams = observe_tensor(weight, spec, "w")
    start = qparams.quantize(weight)
    got = qparams.dequantize(descend(weight, start, qparams, hessian, sweeps), torch.float32)
    expected = lost(weight, literal(weight, qparams, start, hessian, sweeps), hessian)
    # a number between two codes may fall to either side, after which the paths part
    assert lost(weight, got, hessian) == pytest.approx(expected, rel=0.02)
    assert lost(weight, got, hessian) < lost(weight, qparams.dequantize(start, torch.float32), hessian)


@pytest.mark.parametrize("text", ["int4:g16:sym", "int3:channel:sym", "uint4:g32:asym"])
def test_in_the_end_no_single_code_could_be_better(text: str) -> None:
    weight, statistics = problem()
    hessian, spec = statistics.get("hessian", "w"), QuantSpec.parse(text)
    qparams = observe_tensor(weight, spec, "w")
    codes = descend(weight, qparams.quantize(weight), qparams, hessian, 100)
    best = lost(weight, qparams.dequantize(codes, torch.float32), hessian)
    grid, values = grid_of(qparams, weight.shape), qparams.dequantize(codes, torch.float32).double()
    for j in range(0, weight.shape[1], 7):
        for level in range(grid.shape[-1]):
            other = values.clone()
            other[:, j] = grid[:, j, level]
            rows = [lost(weight[i : i + 1], other[i : i + 1], hessian) for i in range(len(weight))]
            own = [lost(weight[i : i + 1], values[i : i + 1], hessian) for i in range(len(weight))]
            assert all(a > b - 1e-5 * best for a, b in zip(rows, own, strict=True))


@pytest.mark.parametrize("text", ["int4:g16:sym", "uint4:g16:asym:zero=float", "nf4:g16"])
def test_gptq_loses_less_with_it(text: str) -> None:
    weight, statistics = problem(columns=128)
    hessian, spec = statistics.get("hessian", "w"), QuantSpec.parse(text)
    losses = []
    for sweeps in (0, 1, 4):
        rounded = GPTQ(GPTQOptions(sweeps=sweeps)).round(weight, spec, "w", statistics)
        losses.append(lost(weight, rounded.qparams.dequantize(rounded.integers, torch.float32), hessian))
    assert losses[2] < losses[1] < 0.99 * losses[0]


def test_each_group_of_rows_goes_by_its_own_inputs() -> None:
    weight, first = problem()
    second = problem(seed=1)[1]
    both = InputStatistics()
    generator = torch.Generator().manual_seed(5)
    both.add(torch.randn(2, 300, 64, generator=generator) @ torch.randn(2, 64, 64, generator=generator))
    spec = QuantSpec.parse("int4:g16:sym")
    qparams = observe_tensor(weight, spec, "w")
    start, hessians = qparams.quantize(weight), torch.stack([s.get("hessian", "w") for s in (first, second)])
    together = descend(weight, start, qparams, hessians, 2)
    for part, hessian in zip((slice(0, 12), slice(12, 24)), hessians, strict=True):
        alone = descend(weight, start, qparams, hessian, 2)
        assert torch.equal(together[part], alone[part])
    rounded = GPTQ(GPTQOptions(sweeps=2)).round(weight, spec, "w", both)
    assert rounded.integers.shape == weight.shape


def test_columns_that_no_data_reached_are_rounded_to_nearest() -> None:
    weight, _ = problem()
    statistics = InputStatistics()
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5:9] = 0
    statistics.add(x)
    rounded = GPTQ(GPTQOptions(sweeps=2)).round(weight, QuantSpec.parse("int4:channel:sym"), "w", statistics)
    nearest = rounded.qparams.quantize(weight)
    assert torch.equal(rounded.integers[:, 5:9], nearest[:, 5:9])
