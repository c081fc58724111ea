import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.quant.strategies import INTEGERS, matrices, weight_specs
from wrapq.errors import SpecError
from wrapq.quant import affine
from wrapq.quant.dtypes import DTYPES
from wrapq.quant.spec import QuantSpec

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def qparams(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    return affine.range_to_qparams(*affine.reduce_range(x, spec), spec)


def per_element(x: Tensor, values: Tensor, spec: QuantSpec) -> np.ndarray:
    """Scales or zero points repeated so that each element of a matrix has its own."""
    if spec.granularity == "group":
        values = values.repeat_interleave(spec.group_size, dim=-1)
    return values.expand(x.shape).double().numpy()


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@given(matrices(), weight_specs())
def test_agrees_with_a_float64_reference(x: Tensor, spec: QuantSpec):
    scale, zero_point = qparams(x, spec)
    q = affine.quantize(x, scale, zero_point, spec)
    low, high = (per_element(x, bound, spec) for bound in affine.reduce_range(x, spec))
    qmin, qmax = spec.dtype.qmin, spec.dtype.qmax
    if spec.symmetric:
        expected = np.maximum(np.abs(low), np.abs(high)) / ((qmax - qmin) / 2)
        expected_zero = np.full(x.shape, 0.0 if spec.dtype.signed else 2.0 ** (spec.dtype.bits - 1))
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        expected = (high - low) / (qmax - qmin)
        expected_zero = np.clip(np.rint(qmin - low / np.where(expected == 0, 1, expected)), qmin, qmax)
    expected = np.where(expected == 0, 1, expected)
    np.testing.assert_allclose(per_element(x, scale, spec), expected, rtol=3e-7)
    zero = np.zeros(x.shape) if zero_point is None else per_element(x, zero_point, spec)
    np.testing.assert_allclose(zero, expected_zero, atol=0 if spec.symmetric else 1)
    steps = x.double().numpy() / expected
    ideal = np.clip(np.rint(steps) + zero, qmin, qmax)
    near_tie = np.abs(np.abs(steps - np.trunc(steps)) - 0.5) < 1e-6 * np.maximum(1, np.abs(steps))
    assert np.all((q.numpy() == ideal) | near_tie)


@given(st.sampled_from(FLOATS).flatmap(lambda dtype: matrices(dtype=dtype)), weight_specs())
def test_fake_quantize_is_dequantize_of_quantize_to_the_bit(x: Tensor, spec: QuantSpec):
    scale, zero_point = qparams(x, spec)
    q = affine.quantize(x, scale, zero_point, spec)
    fake = affine.fake_quantize(x, scale, zero_point, spec)
    assert q.dtype == affine.storage_dtype(spec.dtype) and q.shape == x.shape
    assert fake.dtype == x.dtype
    assert torch.equal(bits(fake), bits(affine.dequantize(q, scale, zero_point, spec, x.dtype)))


@given(matrices(), weight_specs())
def test_quantizing_what_was_quantized_changes_nothing(x: Tensor, spec: QuantSpec):
    scale, zero_point = qparams(x, spec)
    q = affine.quantize(x, scale, zero_point, spec)
    again = affine.quantize(affine.dequantize(q, scale, zero_point, spec, x.dtype), scale, zero_point, spec)
    assert torch.equal(again, q)


@given(matrices(), weight_specs())
def test_no_element_of_the_range_is_off_by_more_than_half_a_step(x: Tensor, spec: QuantSpec):
    scale, zero_point = qparams(x, spec)
    error = (affine.fake_quantize(x, scale, zero_point, spec).double() - x.double()).abs().numpy()
    # an asymmetric range moves by up to half a step more at its ends, where its zero point was rounded
    allowed = (0.5 if spec.symmetric else 1.0) * per_element(x, scale, spec)
    rounding = 1e-6 * x.double().abs().numpy().max() + 1e-37
    assert np.all(error <= allowed * (1 + 1e-6) + rounding)


@given(matrices(rows=1, columns=48), weight_specs(group_sizes=(48,)))
def test_order_is_kept(x: Tensor, spec: QuantSpec):
    if spec.granularity == "channel":
        spec = QuantSpec(spec.dtype, "tensor", symmetric=spec.symmetric)
    x = x.sort(dim=-1).values
    q = affine.quantize(x, *qparams(x, spec), spec).long()
    assert bool((q.diff(dim=-1) >= 0).all())


@given(matrices(), weight_specs())
def test_symmetric_grids_mirror_the_tensor_away_from_their_ends(x: Tensor, spec: QuantSpec):
    if not spec.symmetric:
        spec = QuantSpec(spec.dtype, spec.granularity, spec.axis, spec.group_size, True, spec.dynamic)
    (scale, zero_point), (mirrored, _) = qparams(x, spec), qparams(-x, spec)
    assert torch.equal(scale, mirrored)
    zero = 0 if spec.dtype.signed else 1 << (spec.dtype.bits - 1)
    q = affine.quantize(x, scale, zero_point, spec).long() - zero
    opposite = affine.quantize(-x, scale, zero_point, spec).long() - zero
    inside = q.abs() < 1 << (spec.dtype.bits - 1)
    assert torch.equal(q[inside & (opposite.abs() == q.abs())], -opposite[inside & (opposite.abs() == q.abs())])
    assert int((q + opposite).abs().max()) <= 1


@given(matrices(), weight_specs())
def test_zero_stays_zero(x: Tensor, spec: QuantSpec):
    scale, zero_point = qparams(x, spec)
    assert not affine.fake_quantize(torch.zeros_like(x), scale, zero_point, spec).any()


@pytest.mark.parametrize("name", [dtype.name for dtype in INTEGERS])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_grid_point_survives(name: str, symmetric: bool):
    spec = QuantSpec(DTYPES[name], symmetric=symmetric)
    grid = torch.arange(spec.dtype.qmin, spec.dtype.qmax + 1).to(affine.storage_dtype(spec.dtype))
    scale, zero_point = affine.range_to_qparams(torch.tensor([-1.0]), torch.tensor([0.7]), spec)
    x = affine.dequantize(grid, scale, zero_point, spec, torch.float32)
    assert torch.equal(affine.quantize(x, scale, zero_point, spec), grid)
    assert torch.equal(affine.fake_quantize(x, scale, zero_point, spec), x)


@pytest.mark.parametrize(
    ("text", "shape", "expected"),
    [
        ("int8:tensor", (4, 6), (1,)),
        ("int8:channel", (4, 6), (4, 1)),
        ("int8:channel@-1", (2, 4, 6), (1, 1, 6)),
        ("int8:channel@1", (2, 4, 6), (1, 4, 1)),
        ("int4:g3", (4, 6), (4, 2)),
        ("int4:g6", (2, 4, 6), (2, 4, 1)),
        ("int8:token:dyn", (2, 4, 6), (2, 4, 1)),
    ],
)
def test_shapes_are_those_promised(text: str, shape: tuple[int, ...], expected: tuple[int, ...]):
    spec, x = QuantSpec.parse(text), torch.randn(shape)
    scale, zero_point = qparams(x, spec)
    assert affine.scale_shape(shape, spec) == tuple(scale.shape) == expected
    assert scale.dtype == torch.float32 and zero_point is None
    asymmetric = QuantSpec.parse(f"u{text}:asym")
    _, zero_point = qparams(x, asymmetric)
    assert zero_point is not None and zero_point.dtype == torch.int32 and tuple(zero_point.shape) == expected


def test_transposed_and_sliced_tensors():
    base = torch.randn(24, 16)
    for text in ["int8:tensor", "uint8:channel:asym", "int4:g4", "int8:token:dyn"]:
        spec = QuantSpec.parse(text)
        for view in (base.t(), base[::2, ::2], base[None].expand(2, -1, -1)):
            parameters = qparams(view, spec)
            expected = affine.fake_quantize(view.contiguous(), *qparams(view.contiguous(), spec), spec)
            assert torch.equal(affine.fake_quantize(view, *parameters, spec), expected)
            assert torch.equal(affine.quantize(view, *parameters, spec), affine.quantize(expected, *parameters, spec))


def test_the_input_is_left_alone():
    x = torch.randn(4, 8)
    before = x.clone()
    spec = QuantSpec.parse("uint8:tensor:asym")
    parameters = qparams(x, spec)
    affine.fake_quantize(x, *parameters, spec)
    q = affine.quantize(x, *parameters, spec)
    kept = q.clone()
    affine.dequantize(q, *parameters, spec, torch.float32)
    affine.dequantize(x, *parameters, spec, torch.float32)
    assert torch.equal(x, before) and torch.equal(q, kept)


@pytest.mark.parametrize("text", ["int4:g7", "uint8:g5:asym:dyn"])
def test_a_group_size_that_does_not_divide_the_width_is_refused_with_the_numbers(text: str):
    with pytest.raises(SpecError, match=r"group size \d does not divide the width 24 \(\d left over\)"):
        affine.reduce_range(torch.randn(2, 24), QuantSpec.parse(text))
    with pytest.raises(SpecError, match="width 24"):
        affine.scale_shape((2, 24), QuantSpec.parse(text))


def test_an_axis_that_is_not_there_is_refused():
    with pytest.raises(SpecError, match="axis 2 of a tensor with 2 dimensions"):
        affine.reduce_range(torch.randn(2, 24), QuantSpec.parse("int8:channel@2"))


@pytest.mark.parametrize(
    "text", ["int8:tensor", "uint8:tensor:asym", "int4:channel", "uint4:channel:asym", "uint16:tensor"]
)
@pytest.mark.parametrize("value", [0.0, 3.5, -3.5, 1e-30, 65504.0, 1e-44, -1e-40, 3.3e38])
def test_constant_tensors(text: str, value: float):
    spec, x = QuantSpec.parse(text), torch.full((2, 8), value)
    scale, zero_point = qparams(x, spec)
    assert bool(torch.isfinite(scale).all()) and bool((scale >= affine.TINY).all())
    result = affine.fake_quantize(x, scale, zero_point, spec)
    assert bool(torch.isfinite(result).all())
    if value == 0:
        assert bool((scale == 1).all())
    if 1e-30 < abs(value) < 3e38:  # at the very end of float32 the scale is limited, so that nothing overflows
        steps = (1 << spec.dtype.bits) - 1
        torch.testing.assert_close(result, x, rtol=1.01 / steps, atol=0)


def test_an_all_zero_channel_has_scale_one_and_leaves_its_neighbours_alone():
    x = torch.randn(3, 8)
    x[1] = 0
    for text in ["int4:channel", "uint4:channel:asym"]:
        scale, zero_point = qparams(x, QuantSpec.parse(text))
        assert scale[1].item() == 1 and scale[0].item() != 1
        assert zero_point is None or zero_point[1].item() == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_a_range_that_excludes_zero_is_widened_to_hold_it(sign: int):
    x = sign * torch.linspace(2, 5, 16)
    spec = QuantSpec.parse("uint8:tensor:asym")
    scale, zero_point = qparams(x, spec)
    torch.testing.assert_close(scale, torch.tensor([5 / 255]))
    assert zero_point.item() == (0 if sign > 0 else 255)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("text", ["int2:tensor", "int8:tensor", "uint8:tensor:asym", "int16:tensor", "uint16:tensor"])
def test_the_largest_finite_numbers_stay_finite(dtype: torch.dtype, text: str):
    big = torch.finfo(dtype).max
    for x in (torch.tensor([-big, 0, big], dtype=dtype), torch.tensor([-big, 1.0], dtype=dtype)):
        assert bool(torch.isfinite(affine.dynamic_fake_quantize(x, QuantSpec.parse(f"{text}:dyn"))).all())


def test_nan_and_inf_propagate_in_ranges():
    spec = QuantSpec.parse("int8:channel")
    low, high = affine.reduce_range(torch.tensor([[1.0, float("nan")], [2.0, float("-inf")], [1.0, 2.0]]), spec)
    assert torch.isnan(low).flatten().tolist() == [True, False, False] and torch.isneginf(low[1]).item()
    assert torch.isfinite(high).flatten().tolist() == [False, True, True]


def test_dynamic_token_scales_are_those_of_each_vector():
    x, spec = torch.randn(2, 3, 8), QuantSpec.parse("int8:token:dyn")
    each = torch.stack([affine.dynamic_fake_quantize(row[None], spec)[0] for row in x.flatten(0, 1)]).view_as(x)
    assert torch.equal(affine.dynamic_fake_quantize(x, spec), each)


@pytest.mark.parametrize("text", ["int8:token:dyn", "int8:tensor:dyn", "int8:g4:dyn", "int8:channel@-1:dyn"])
def test_dynamic_quantization_of_an_empty_tensor(text: str):
    assert affine.dynamic_fake_quantize(torch.zeros(0, 8), QuantSpec.parse(text)).shape == (0, 8)


def test_a_scale_shared_by_all_positions_broadcasts():
    x, spec = torch.randn(2, 3, 8), QuantSpec.parse("int8:g4")
    shared = torch.tensor([0.1, 0.2])
    assert torch.equal(
        affine.fake_quantize(x, shared, None, spec), affine.fake_quantize(x, shared.expand(2, 3, 2), None, spec)
    )


@pytest.mark.parametrize(
    "spec", ["int4:g8:asym", "int8:channel", "int8:tensor", "int4:b4x8", "fp8_e4m3:channel", "int8:channel@1"]
)
def test_large_tensors_are_worked_on_in_pieces_to_the_same_bits(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = QuantSpec.parse(spec)
    x = torch.randn(23, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    parameters = qparams(x, parsed)
    codes = affine.quantize(x, *parameters, parsed)
    numbers = affine.dequantize(codes, *parameters, parsed, torch.bfloat16)
    monkeypatch.setattr(affine, "_PIECE", 100)
    assert torch.equal(affine.quantize(x, *parameters, parsed).view(torch.int8), codes.view(torch.int8))
    assert torch.equal(affine.dequantize(codes, *parameters, parsed, torch.bfloat16), numbers)


@pytest.mark.parametrize(
    "text",
    ["int8:tensor", "int8:channel", "int8:channel@1", "uint4:g8:asym", "int8:b4x8", "fp8_e4m3:channel", "nf4:g8"],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_parts_of_rows_give_what_the_whole_gives(text: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    spec, x = QuantSpec.parse(text), torch.randn(19, 24).to(dtype)
    parameters = qparams(x, spec)
    codes = affine.quantize(x, *parameters, spec)
    whole = codes, affine.dequantize(codes, *parameters, spec, dtype), affine.fake_quantize(x, *parameters, spec)
    monkeypatch.setattr(affine, "_PIECE", 50)
    assert len(list(affine.row_parts(x))) == 10
    codes = affine.quantize(x, *parameters, spec)
    parts = codes, affine.dequantize(codes, *parameters, spec, dtype), affine.fake_quantize(x, *parameters, spec)
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))


@pytest.mark.parametrize("text", ["int8:tensor", "uint8:tensor:asym", "int8:channel@-1", "int4:g8"])
def test_activations_in_parts_are_those_of_the_whole(text: str, monkeypatch: pytest.MonkeyPatch):
    spec, x = QuantSpec.parse(text), torch.randn(2, 19, 24)
    parameters = qparams(x, spec)
    whole = affine.fake_quantize(x, *parameters, spec)
    monkeypatch.setattr(affine, "_PIECE", 50)
    assert torch.equal(affine.fake_quantize(x, *parameters, spec), whole)
    turned = x.transpose(0, 1)
    if spec.granularity == "tensor":
        assert torch.equal(affine.fake_quantize(turned, *parameters, spec), whole.transpose(0, 1))
