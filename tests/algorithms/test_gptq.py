"""GPTQ against a literal transcription of the paper's algorithm in float64, and its edge cases."""

from __future__ import annotations

import pytest
import torch

from wrapq.algorithms.gptq import GPTQ, gptq
from wrapq.algorithms.rtn import RTN
from wrapq.algorithms.seqmse import SeqMSE, output_error, search_ranges
from wrapq.calibration.algorithm import Rounded
from wrapq.calibration.hessian import Hessian, factorize
from wrapq.errors import CalibrationError
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec

SPECS = ["int4:g16:sym", "int4:channel:sym", "uint4:g32:asym", "int3:channel:sym", "int8:tensor:sym", "uint2:g16:asym"]


def problem(rows: int = 24, columns: int = 64, seed: int = 0) -> tuple[torch.Tensor, Hessian]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator)
    hessian = Hessian()
    hessian.add(torch.randn(4 * columns, columns, generator=generator) @ mixing)
    return weight, hessian


def literal_gptq(weight, hessian, scale, zero, spec, damp, act_order):
    """Algorithm 1 of arXiv:2210.17323 without blocks: every column updates all columns after it."""
    size = len(hessian)
    h = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(size, dtype=torch.float64)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(size)
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    w, integers = weight.double()[:, order].clone(), torch.zeros(weight.shape, dtype=torch.int64)
    scale, zero = scale.double()[:, order], zero.double()[:, order]
    for i in range(size):
        q = (torch.round(w[:, i] / scale[:, i]) + zero[:, i]).clamp(spec.dtype.qmin, spec.dtype.qmax)
        error = (w[:, i] - (q - zero[:, i]) * scale[:, i]) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
        integers[:, order[i]] = q.long()
    return integers


def spread(value, spec, shape):
    """A scale or zero point for every element of a matrix of `shape`."""
    if value is None:
        return torch.zeros(shape)
    value = value.repeat_interleave(spec.group_size, -1) if spec.granularity == "group" else value
    return value.float().expand(shape)


def loss(weight, rounded, hessian):
    difference = (rounded.qparams.dequantize(rounded.integers, torch.float32) - weight).double()
    return float(((difference @ hessian.matrix.double()) * difference).sum())


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_same_integers_as_the_papers_algorithm(text, act_order, seed):
    spec, (weight, hessian) = QuantSpec.parse(text), problem(seed=seed)
    qparams = observe_tensor(weight, spec, "w")
    scale, zero = (spread(t, spec, weight.shape) for t in (qparams.scale, qparams.zero_point))
    expected = literal_gptq(weight, hessian.matrix, scale, zero, spec, 0.01, act_order)
    got = gptq(weight, qparams, hessian.factor(0.01, act_order, "w"), block_size=16)
    # the largest weight of a symmetric range lies on a tie (7.5 steps), which float32 and float64 may break
    # differently; the row then goes on from another error, so whole rows are compared
    same = (got.long() == expected).all(1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(
        loss(weight, Rounded(got, qparams), hessian),
        loss(weight, Rounded(expected, qparams), hessian),
        rtol=0.02,
        atol=0,
    )


@pytest.mark.parametrize("block_size", [1, 7, 64, 1000])
def test_block_size_does_not_change_the_result(block_size):
    spec, (weight, hessian) = QuantSpec.parse("int4:g16:sym"), problem()
    qparams, factor = observe_tensor(weight, spec, "w"), hessian.factor(0.01, True, "w")
    assert torch.equal(gptq(weight, qparams, factor, block_size), gptq(weight, qparams, factor, 16))


@pytest.mark.parametrize("text", SPECS[:4])
def test_each_step_up_lowers_the_output_error(text):
    spec, (weight, hessian) = QuantSpec.parse(text), problem(64, 128)
    losses = {}
    for name, algorithm in {"rtn": RTN(), "seqmse": SeqMSE(), "gptq": GPTQ()}.items():
        losses[name] = loss(weight, algorithm.round(weight, spec, "w", hessian), hessian)
    assert losses["seqmse"] < losses["rtn"] * 0.999
    assert losses["gptq"] < losses["rtn"] * 0.9


def test_dead_columns_are_rounded_to_nearest_and_reported():
    weight, hessian = problem()
    hessian.matrix[:, 5] = hessian.matrix[5] = 0
    rounded = GPTQ().round(weight, QuantSpec.parse("int8:channel:sym"), "w", hessian)
    assert rounded.report["dead_columns"] == 1
    assert torch.equal(rounded.integers[:, 5], rounded.qparams.quantize(weight)[:, 5])


def test_a_singular_hessian_is_damped_until_it_factorizes():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    hessian = Hessian()
    hessian.add(torch.ones(1, 32) * 1e4)  # one calibration token: rank one
    rounded = GPTQ(GPTQ.Options(damp=1e-9)).round(weight, QuantSpec.parse("int4:channel:sym"), "w", hessian)
    assert rounded.report["damp"] > 1e-9
    assert torch.isfinite(rounded.qparams.dequantize(rounded.integers, torch.float32)).all()


def test_all_zero_inputs_give_rounding_to_nearest():
    weight, hessian = torch.randn(8, 32), Hessian()
    hessian.add(torch.zeros(10, 32))
    spec = QuantSpec.parse("int4:channel:sym")
    assert torch.equal(GPTQ().round(weight, spec, "w", hessian).integers, RTN().round(weight, spec, "w").integers)


def test_a_weight_that_no_token_reached_is_refused_by_name():
    with pytest.raises(CalibrationError, match=r"^layers\.3\.expert\.weight: no calibration token reached this weight"):
        GPTQ().round(torch.randn(4, 8), QuantSpec.parse("int4:channel:sym"), "layers.3.expert.weight", Hessian())


def test_nan_in_the_data_is_refused_by_name():
    hessian = Hessian()
    hessian.add(torch.full((2, 8), float("nan")))
    with pytest.raises(CalibrationError, match=r"^w: the data holds NaN or inf"):
        SeqMSE().round(torch.randn(4, 8), QuantSpec.parse("int4:channel:sym"), "w", hessian)


def test_factor_is_the_upper_cholesky_factor_of_the_damped_inverse():
    _, hessian = problem()
    factor = factorize(hessian.matrix, 0.05, False, "w")
    damped = hessian.matrix.double() + 0.05 * hessian.matrix.double().diagonal().mean() * torch.eye(64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor.upper.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("text", ["int4:channel:sym", "int3:g16:sym", "uint4:g16:asym", "int4:tensor:sym"])
def test_seqmse_takes_the_best_of_its_candidates(text):
    """By brute force over the candidates, each group or row on its own, in float64."""
    spec, (weight, hessian) = QuantSpec.parse(text), problem(6, 32)
    chosen = search_ranges(weight, spec, hessian.matrix, "w", candidates=5, smallest=0.5)
    best = output_error((chosen.fake_quantize(weight) - weight).double(), hessian.matrix.double(), spec)
    from wrapq.observers.base import checked_qparams
    from wrapq.quant.affine import reduce_range

    low, high = reduce_range(weight, spec)
    for factor in (1.0, 0.875, 0.75, 0.625, 0.5):
        tried = checked_qparams(low * factor, high * factor, spec, "w")
        error = output_error((tried.fake_quantize(weight) - weight).double(), hessian.matrix.double(), spec)
        assert (best <= error * (1 + 1e-4)).all()


def test_output_error_is_the_trace_form():
    difference, (_, hessian) = torch.randn(6, 64), problem()
    whole = output_error(difference, hessian.matrix, QuantSpec.parse("int4:tensor:sym"))
    rows = output_error(difference, hessian.matrix, QuantSpec.parse("int4:channel:sym"))
    trace = torch.trace(difference.double() @ hessian.matrix.double() @ difference.double().t())
    torch.testing.assert_close(whole.double(), trace.reshape(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(rows.sum().double(), trace, rtol=1e-4, atol=0)
