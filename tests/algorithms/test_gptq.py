"""GPTQ against a literal transcription of the paper's algorithm in float64, and its edge cases."""

from __future__ import annotations

import math

import pytest
import torch

from wrapq.algorithms.columns import gptq
from wrapq.algorithms.gptq import GPTQ, GPTQOptions
from wrapq.algorithms.rtn import RTN
from wrapq.algorithms.seqmse import SeqMSE, output_error, search_ranges
from wrapq.errors import CalibrationError
from wrapq.observers.base import observe_tensor
from wrapq.quant.affine import range_to_qparams, reduce_range, storage_dtype
from wrapq.quant.packing import pack, unpack
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.cholesky import factorize
from wrapq.statistics.input import InputStatistics

SPECS = ["int4:g16:sym", "int4:channel:sym", "uint4:g32:asym", "int3:channel:sym", "int8:tensor:sym", "uint2:g16:asym"]
SPECS += ["int2:g16:sym:signed:mse", "uint4:g16:asym:zero=float", "int3:channel:asym:zero=float:scale=bfloat16"]
OTHER_SPECS = [
    *("mxfp4", "nvfp4", "nf4:g16", "fp4_e2m1:channel", "mxfp6", "mxfp8_e5m2", "fp8_e4m3:channel", "mxint8"),
    *("int4:b8x16", "uint4:b7x24:asym", "fp8_e4m3:b16x16", "fp4_e2m1:b10x20", "int4:channel@1"),
]


def problem(rows: int = 24, columns: int = 64, seed: int = 0) -> tuple[torch.Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator)
    hessian = InputStatistics()
    hessian.add(torch.randn(4 * columns, columns, generator=generator) @ mixing)
    return weight, hessian


def literal_gptq(weight, hessian, qparams, damp, act_order):
    """Algorithm 1 of arXiv:2210.17323 without blocks, in float64: every column updates all columns after it.

    The grid is the list of its numbers, of which the nearest is taken.
    """
    size = len(hessian)
    h = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(size, dtype=torch.float64)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(size)
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    w, result = weight.double()[:, order].clone(), torch.empty(weight.shape, dtype=torch.float64)
    scale, zero = (spread(t, qparams.spec, weight.shape)[:, order] for t in (qparams.scale, qparams.zero_point))
    if qparams.global_scale is not None:
        scale = scale / qparams.global_scale.double()
    grid = torch.tensor([v for v in qparams.spec.dtype.values() if math.isfinite(v)], dtype=torch.float64)
    for i in range(size):
        distance = (grid - zero[:, i, None] - (w[:, i] / scale[:, i])[:, None]).abs()
        q = (grid[distance.argmin(1)] - zero[:, i]) * scale[:, i]
        w[:, i:] -= ((w[:, i] - q) / upper[i, i])[:, None] * upper[i, i:]
        result[:, order[i]] = q
    return result


def spread(value, spec, shape):
    """A scale or zero point, float64, for every element of a matrix of `shape`."""
    out = torch.zeros(shape, dtype=torch.float64)
    if value is None:
        return out
    tall, wide = spec.block_size or (1, spec.group_size or shape[1] // value.shape[-1])
    for row in range(shape[0]):
        for column in range(shape[1]):
            out[row, column] = value[min(row // tall, len(value) - 1)].reshape(-1)[column // wide]
    return out


def loss(weight, rounded, hessian):
    return output_loss(weight, rounded.qparams.dequantize(rounded.integers, torch.float32), hessian)


def output_loss(weight, dequantized, hessian):
    difference = dequantized.double() - weight.double()
    return float(((difference @ hessian.sums["hessian"].double()) * difference).sum())


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("text", [*SPECS, *OTHER_SPECS])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_same_numbers_as_the_papers_algorithm(text, act_order, seed):
    spec, (weight, hessian) = QuantSpec.parse(text), problem(seed=seed)
    qparams = observe_tensor(weight, spec, "w")
    expected = literal_gptq(weight, hessian.sums["hessian"], qparams, 0.01, act_order)
    ((codes, _),) = gptq(weight, [qparams], hessian.factor(0.01, act_order, "w"), block_size=16)
    got = qparams.dequantize(codes, torch.float32)
    # a weight on a tie, as the largest of a symmetric integer range is (7.5 steps), may go one way in float32 and
    # another in float64; the row then goes on from another error, so whole rows are compared
    same = torch.isclose(got.double(), expected, rtol=1e-5, atol=1e-7).all(1)
    assert same.float().mean() > 0.9
    assert output_loss(weight, got, hessian) == pytest.approx(output_loss(weight, expected, hessian), rel=0.02)


@pytest.mark.parametrize("text", OTHER_SPECS)
def test_codes_are_those_of_the_checkpoint(text):
    """Quantizing the numbers that the codes stand for gives the codes again, but for the sign of a zero."""
    spec, (weight, hessian) = QuantSpec.parse(text), problem()
    rounded = GPTQ().round(weight, spec, "w", hessian)
    dequantized = rounded.qparams.dequantize(rounded.integers, torch.float32)
    assert rounded.integers.dtype == storage_dtype(spec.dtype)
    assert torch.equal(rounded.qparams.fake_quantize(dequantized), dequantized)
    assert torch.equal(unpack(pack(rounded.integers, spec.dtype), spec.dtype, 64), rounded.integers)


@pytest.mark.parametrize("block_size", [1, 7, 64, 1000])
def test_block_size_does_not_change_the_result(block_size):
    spec, (weight, hessian) = QuantSpec.parse("int4:g16:sym"), problem()
    qparams, factor = observe_tensor(weight, spec, "w"), hessian.factor(0.01, True, "w")
    of_some, of_16 = (gptq(weight, [qparams], factor, size)[0] for size in (block_size, 16))
    assert torch.equal(of_some.codes, of_16.codes)
    torch.testing.assert_close(of_some.lost, of_16.lost, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", [*SPECS[:4], *OTHER_SPECS])
def test_gptq_lowers_the_output_error(text):
    spec, (weight, hessian) = QuantSpec.parse(text), problem(64, 128)
    nearest, chosen = (
        loss(weight, algorithm.round(weight, spec, "w", hessian), hessian) for algorithm in (RTN(), GPTQ())
    )
    assert chosen < nearest * 0.9


@pytest.mark.parametrize("text", [*SPECS[:4], "mxfp4", "nvfp4", "nf4:g16", "fp4_e2m1:channel", "int4:b8x16"])
def test_seqmse_lowers_the_output_error(text):
    spec, (weight, hessian) = QuantSpec.parse(text), problem(64, 128)
    losses = [loss(weight, algorithm.round(weight, spec, "w", hessian), hessian) for algorithm in (RTN(), SeqMSE())]
    assert losses[1] < losses[0] * 0.999


def test_dead_columns_are_rounded_to_nearest_and_reported():
    weight, hessian = problem()
    hessian.sums["hessian"][:, 5] = hessian.sums["hessian"][5] = 0
    rounded = GPTQ().round(weight, QuantSpec.parse("int8:channel:sym"), "w", hessian)
    assert rounded.report["dead_columns"] == 1
    assert torch.equal(rounded.integers[:, 5], rounded.qparams.quantize(weight)[:, 5])


def test_a_singular_hessian_is_damped_until_it_factorizes():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    hessian = InputStatistics()
    hessian.add(torch.ones(1, 32) * 1e4)  # one calibration token: rank one
    rounded = GPTQ(GPTQ.Options(damp=1e-9)).round(weight, QuantSpec.parse("int4:channel:sym"), "w", hessian)
    assert rounded.report["damp"] > 1e-9
    assert torch.isfinite(rounded.qparams.dequantize(rounded.integers, torch.float32)).all()


@pytest.mark.parametrize("columns", [128, 129, 500])
def test_a_hessian_is_factored_whatever_its_size(columns):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    hessian = rows.t() @ rows
    factor = factorize(hessian, 0.01, True)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(columns)
    expected = torch.linalg.inv(damped[factor.order][:, factor.order])
    torch.testing.assert_close((factor.upper.t() @ factor.upper).double(), expected, rtol=1e-3, atol=1e-6)
    assert factor.damp == 0.01 and not factor.upper.tril(-1).any()


@pytest.mark.parametrize("negative", [0, 200, 299])
def test_a_hessian_that_is_indefinite_anywhere_is_damped_more(negative):
    hessian = torch.eye(300)
    hessian[negative, negative] = -0.05
    assert factorize(hessian, 0.01, False).damp > 0.05 > 0.01 == factorize(torch.eye(300), 0.01, False).damp


def test_all_zero_inputs_give_rounding_to_nearest():
    weight, hessian = torch.randn(8, 32), InputStatistics()
    hessian.add(torch.zeros(10, 32))
    spec = QuantSpec.parse("int4:channel:sym")
    assert torch.equal(GPTQ().round(weight, spec, "w", hessian).integers, RTN().round(weight, spec, "w").integers)


def test_a_weight_that_no_token_reached_is_refused_by_name():
    with pytest.raises(CalibrationError, match=r"^layers\.3\.expert\.weight: no calibration token reached this weight"):
        GPTQ().round(
            torch.randn(4, 8), QuantSpec.parse("int4:channel:sym"), "layers.3.expert.weight", InputStatistics()
        )


def test_nan_in_the_data_is_refused_by_name():
    hessian = InputStatistics()
    hessian.add(torch.full((2, 8), float("nan")))
    with pytest.raises(CalibrationError, match=r"^w: the data holds NaN or inf"):
        SeqMSE().round(torch.randn(4, 8), QuantSpec.parse("int4:channel:sym"), "w", hessian)


def test_factor_is_the_upper_cholesky_factor_of_the_damped_inverse():
    _, hessian = problem()
    factor = factorize(hessian.sums["hessian"], 0.05, False)
    damped = hessian.sums["hessian"].double() + 0.05 * hessian.sums["hessian"].double().diagonal().mean() * torch.eye(
        64
    )
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor.upper.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        *("int4:channel:sym", "int3:g16:sym", "uint4:g16:asym", "int4:tensor:sym", "int4:channel@1"),
        *("int4:b2x8", "int4:b4x24", "fp4_e2m1:channel", "nf4:g16", "nvfp4", "mxfp4"),
    ],
)
def test_seqmse_takes_the_best_of_its_candidates(text):
    """By brute force over the candidates, each scale's elements on their own, in float64."""
    spec, (weight, hessian) = QuantSpec.parse(text), problem(6, 32)
    whole = observe_tensor(weight, spec, "w")
    low, high = reduce_range(weight, spec)

    owner = spread(torch.arange(whole.scale.numel()).reshape(whole.scale.shape), spec, weight.shape)

    def errors(qparams):
        difference = (qparams.fake_quantize(weight) - weight).double()
        parts = [difference * (owner == scale) for scale in range(whole.scale.numel())]
        return torch.stack([((part @ hessian.sums["hessian"].double()) * part).sum() for part in parts])

    chosen = search_ranges(weight, spec, hessian.sums["hessian"], "w", candidates=5, smallest=0.5)
    best = torch.full((whole.scale.numel(),), math.inf, dtype=torch.float64)
    for factor in (2.0, 1.0, 0.5, 0.25) if spec.scale_dtype == "e8m0" else (1.0, 0.875, 0.75, 0.625, 0.5):
        scale, zero_point = range_to_qparams(low * factor, high * factor, spec, whole.global_scale)
        best = best.minimum(errors(QParams(spec, scale, zero_point, global_scale=whole.global_scale)))
    torch.testing.assert_close(errors(chosen), best, rtol=1e-4, atol=1e-6)


def test_output_error_is_the_trace_form():
    difference, (_, hessian) = torch.randn(6, 64), problem()
    matrix, groups = hessian.sums["hessian"], difference.unflatten(1, (-1, 16)).transpose(0, 1)
    rows = output_error(matrix, QuantSpec.parse("int4:channel:sym"))(difference[None])[0]
    within = output_error(matrix, QuantSpec.parse("int4:g16:sym"))(groups)
    for i, row in enumerate(difference.double()):
        torch.testing.assert_close(rows[i].double(), row @ matrix.double() @ row, rtol=1e-4, atol=0)
        for g, part in enumerate(row.split(16)):
            block = matrix[16 * g : 16 * g + 16, 16 * g : 16 * g + 16].double()
            torch.testing.assert_close(within[g, i].double(), part @ block @ part, rtol=1e-4, atol=0)


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
def test_asymmetric_calibration_makes_up_for_the_inputs_error(act_order):
    """In the grid of 8 bits, where rounding is next to nothing, V X comes as near to W F as least squares can."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(16, 48, generator=generator)
    float_rows = torch.randn(400, 48, generator=generator)
    rows = float_rows + 0.3 * torch.randn(400, 48, generator=generator)
    hessian = InputStatistics(("hessian", "cross"))
    hessian.add(rows[:150], float_rows[:150])
    hessian.add(rows[150:], float_rows[150:])
    best = torch.linalg.lstsq(rows.double(), float_rows.double() @ weight.double().t()).solution.t()
    spec = QuantSpec.parse("int8:channel:sym")

    def loss(options):
        rounded = GPTQ(GPTQOptions(act_order=act_order, damp=1e-6, **options)).round(weight, spec, "w", hessian)
        values = rounded.qparams.dequantize(rounded.integers, torch.float32).double()
        return float((values @ rows.t().double() - weight.double() @ float_rows.t().double()).square().sum())

    floor = float((best @ rows.t().double() - weight.double() @ float_rows.t().double()).square().sum())
    assert loss({"asymmetric": 1.0}) == pytest.approx(floor, rel=0.01)
    assert loss({"asymmetric": 1.0}) < loss({"asymmetric": 0.5}) < loss({})


def test_a_float64_hessian_is_summed_in_float64():
    rows = torch.randn(64, 8)
    hessian = InputStatistics(GPTQ(GPTQOptions(precision="float64")).needs)
    for row in rows:
        hessian.add(row[None])
    assert hessian.sums["hessian"].dtype == torch.float64
    torch.testing.assert_close(hessian.sums["hessian"], rows.double().t() @ rows.double(), rtol=1e-14, atol=1e-14)
    rounded = GPTQ(GPTQOptions(precision="float64")).round(
        torch.randn(4, 8), QuantSpec.parse("int4:channel"), "w", hessian
    )
    assert rounded.integers.shape == (4, 8)


@pytest.mark.parametrize("text", [*SPECS, "int4:b8x16", "int4:channel@1", "nvfp4", "mxfp4", "int2:g16:sym:mse"])
def test_each_row_gets_the_best_of_the_ranges_that_are_tried(text):
    """Rows that share a scale take one range together, with the least loss; the codes are those of GPTQ in it alone."""
    spec, (weight, hessian) = QuantSpec.parse(text), problem(24, 64)
    algorithm, matrix = GPTQ(), hessian.sums["hessian"].double()
    tried, factor = algorithm._ranges(weight, spec, matrix.float(), "w"), hessian.factor(0.01, True, "w")
    assert len(tried) == 2 + (spec.observer != "minmax")
    together = gptq(weight, tried, factor)
    alone = [gptq(weight, [ranges], factor)[0] for ranges in tried]
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(together, alone, strict=True))
    rounded = algorithm.round(weight, spec, "w", hessian)
    rows = {"block": 8, "tensor": 24}.get(spec.granularity, 24 if spec.axis == 1 else 1)

    damped = matrix + factor.damp * matrix.diagonal().mean() * torch.eye(64)

    def losses(integers, qparams):
        difference = (qparams.dequantize(integers, torch.float32) - weight).double()
        return ((difference @ damped) * difference).sum(1)

    of_rows = torch.stack([losses(its.codes, ranges) for its, ranges in zip(alone, tried, strict=True)])
    torch.testing.assert_close(torch.stack([its.lost for its in together]).double(), of_rows, rtol=1e-3, atol=1e-5)
    best = of_rows.unflatten(1, (-1, rows)).sum(2).amin(0)
    got = losses(rounded.integers, rounded.qparams).unflatten(0, (-1, rows)).sum(1)
    torch.testing.assert_close(got, best, rtol=1e-3, atol=1e-5)


def test_columns_that_no_data_reached_do_not_choose_the_range():
    weight, hessian = problem(24, 64)
    hessian.sums["hessian"][:, 5] = hessian.sums["hessian"][5] = 0
    spec, factor = QuantSpec.parse("int2:channel:sym"), hessian.factor(0.01, True, "w")
    with_any = weight.clone()
    with_any[:, 5] *= 0.5
    ranges = [observe_tensor(weight, spec, "w")]
    torch.testing.assert_close(gptq(weight, ranges, factor)[0].lost, gptq(with_any, ranges, factor)[0].lost)
