"""HQQ against a literal transcription in float64."""

from __future__ import annotations

import pytest
import torch

from wrapq.algorithms.hqq import HQQ, HQQOptions
from wrapq.algorithms.rtn import RTN
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec


def heavy_tailed(rows: int = 16, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (1 + 5 * (torch.rand(rows, columns, generator=generator) > 0.97))


def literal_hqq(row, scale, zero, qmin, qmax, p=0.7, beta=10.0, kappa=1.01, iterations=20):
    """One group of the official solver, in float64, row by row; the zero point that had the least error is kept."""
    row, scale, zero = row.double(), float(scale), float(zero)

    def error(z):
        z = round(z)
        q = torch.clamp(torch.round(row / scale) + z, qmin, qmax)
        return float((row - (q - z) * scale).abs().pow(p).sum())

    best, kept = error(zero), zero
    for _ in range(iterations):
        q = torch.clamp(torch.round(row / scale + zero), qmin, qmax)
        lost = row - (q - zero) * scale
        apart = torch.sign(lost) * torch.relu(lost.abs() - (1 / beta) * lost.abs().pow(p - 1))
        zero = float(torch.mean(q - (row - apart) / scale))
        beta *= kappa
        if (found := error(zero)) < best:
            best, kept = found, zero
    return round(kept)


def literal_free_hqq(row, scale, zero, qmin, qmax, p=0.7, beta=10.0, kappa=1.01, iterations=20):
    """The same with the zero point unrounded throughout, as the official solver keeps it; returns it and its error."""
    row, scale, zero = row.double(), float(scale), float(zero)
    tried = [zero]
    for _ in range(iterations):
        lost = row - (torch.clamp(torch.round(row / scale + zero), qmin, qmax) - zero) * scale
        apart = torch.sign(lost) * torch.relu(lost.abs() - (1 / beta) * lost.abs().pow(p - 1))
        q = torch.clamp(torch.round(row / scale + zero), qmin, qmax)
        zero, beta = float(torch.mean(q - (row - apart) / scale)), beta * kappa
        tried.append(zero)

    def error(z):
        q = torch.clamp(torch.round(row / scale + z), qmin, qmax)
        return float((row - (q - z) * scale).abs().pow(p).sum())

    return min((error(z), z) for z in tried)


@pytest.mark.parametrize("text", ["uint4:g16:asym:zero=float", "int3:channel:asym:zero=float"])
def test_float_zero_points_are_those_of_the_literal_solver(text):
    spec, weight = QuantSpec.parse(text), heavy_tailed()
    start, got = observe_tensor(weight, spec, "w"), HQQ().round(weight, spec, "w")
    groups = weight.reshape(start.scale.numel(), -1)
    pairs = zip(groups, start.scale.flatten(), start.zero_point.flatten(), strict=True)
    expected = torch.tensor([literal_free_hqq(g, s, z, spec.dtype.qmin, spec.dtype.qmax) for g, s, z in pairs])
    zeros = got.qparams.zero_point.flatten()
    assert ((zeros - expected[:, 1]).abs() < 1e-3).float().mean() > 0.9  # a code on a tie may go to either side
    error = (got.qparams.dequantize(got.integers, torch.float32) - weight).abs().pow(0.7).reshape(len(zeros), -1).sum(1)
    torch.testing.assert_close(error, expected[:, 0], rtol=2e-2, atol=0)
    assert not torch.equal(zeros, zeros.round())


@pytest.mark.parametrize("text", ["uint4:g16:asym", "uint2:g32:asym"])
def test_a_float_zero_point_lets_it_find_more(text):
    weight, lost = heavy_tailed(), []
    for algorithm, spec in ((RTN(), text), (HQQ(), text), (HQQ(), f"{text}:zero=float")):
        rounded = algorithm.round(weight, QuantSpec.parse(spec), "w")
        error = (rounded.qparams.dequantize(rounded.integers, torch.float32) - weight).abs().pow(0.7)
        lost.append(float(error.sum()))
    assert lost[2] < 0.98 * lost[1] <= 0.98 * lost[0]


@pytest.mark.parametrize("text", ["uint4:g16:asym", "uint3:channel:asym", "uint2:g32:asym"])
def test_zero_points_are_those_of_the_literal_solver(text):
    spec, weight = QuantSpec.parse(text), heavy_tailed()
    start = observe_tensor(weight, spec, "w")
    got = HQQ().round(weight, spec, "w").qparams
    groups = weight.reshape(start.scale.numel(), -1)
    pairs = zip(groups, start.scale.flatten(), start.zero_point.flatten(), strict=True)
    expected = [literal_hqq(g, s, z, spec.dtype.qmin, spec.dtype.qmax) for g, s, z in pairs]
    same = torch.tensor(expected) == got.zero_point.flatten()
    assert same.float().mean() > 0.95  # a mean on a tie may round to either side
    assert torch.equal(got.scale, start.scale)


@pytest.mark.parametrize(
    "text", ["int4:g16:sym", "int3:channel:sym", "uint4:channel:asym", "int4:b4x16", "nf4:g16", "int4:tensor:sym"]
)
def test_no_range_is_worse_in_the_norm_than_the_one_it_started_from(text):
    spec, weight = QuantSpec.parse(text), heavy_tailed()
    lost = []
    for algorithm in (RTN(), HQQ()):
        rounded = algorithm.round(weight, spec, "w")
        error = (rounded.qparams.dequantize(rounded.integers, torch.float32) - weight).abs().pow(0.7)
        lost.append(float(error.sum()))
    # an integer zero point seldom has a better neighbour; a scale has
    assert lost[1] < lost[0] if spec.symmetric else lost[1] <= lost[0]


def test_a_symmetric_scale_is_the_least_squares_fit_of_its_codes():
    """With beta so large that nothing stands apart: the scale s of codes q with the least |W - s q|^2."""
    weight, spec = torch.tensor([[1.0, 2.1, 2.9, -3.9, 0.0, 1.2, -2.2, 4.0]]), QuantSpec.parse("int4:channel:sym")
    q = RTN().round(weight, spec, "w").integers.double()
    expected = float((q * weight.double()).sum() / (q * q).sum())
    got = HQQ(HQQOptions(beta=1e9, iterations=1, p=1.0)).round(weight, spec, "w").qparams.scale
    assert float(got) == pytest.approx(expected, rel=1e-6) or float(got) == float(
        observe_tensor(weight, spec, "").scale
    )


def test_grids_whose_scales_are_not_free_are_refused():
    assert "powers of two" in HQQ().unsupported(QuantSpec.parse("mxfp4"))
    assert "relative" in HQQ().unsupported(QuantSpec.parse("nvfp4"))
    assert HQQ().unsupported(QuantSpec.parse("int4:g128:sym")) is None
