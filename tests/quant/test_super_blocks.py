"""Scales that are integers times a number in half precision, and minima in place of zero points."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.quant.strategies import matrices
from wrapq.errors import ModelError, SpecError
from wrapq.observers.base import observe_tensor
from wrapq.quant.affine import scale_shape
from wrapq.quant.dtypes import dtype_named
from wrapq.quant.packing import unpack
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec
from wrapq.quant.super_blocks import put_together, round_super, taken_apart

K_QUANTS = ("q4_k", "q5_k", "q6_k")
MINIMA = ("uint4:g8:asym:zero=min", "uint3:channel:asym:zero=min:scale=float16", "uint8:tensor:asym:zero=min")


def literal(qparams: QParams, codes: Tensor) -> np.ndarray:
    """What the stored tensors stand for, in the arithmetic of numpy's float32 and the words of ggml."""
    spec, stored = qparams.spec, qparams.tensors("w")
    groups = 256 // spec.group_size

    def products(name: str, step: str) -> np.ndarray:
        steps = stored[step].numpy().astype(np.float32).repeat(groups, -1)
        integers = unpack(stored[name], dtype_named(spec.scale_dtype), steps.shape[-1]).numpy().astype(np.float32)
        return (steps * integers).repeat(spec.group_size, -1)

    q, scale = codes.numpy().astype(np.float32), products("w_scale", "w_super_scale")
    return scale * q if spec.symmetric else scale * q - products("w_zero_point", "w_zero_point_super_scale")


@pytest.mark.parametrize("text", K_QUANTS)
@given(x=matrices(rows=3, columns=512))
def test_what_is_stored_stands_for_what_was_computed_with(text: str, x: Tensor) -> None:
    qparams = observe_tensor(x.clamp(-60000, 60000), QuantSpec.parse(text), "w")
    codes = qparams.quantize(x)
    assert np.array_equal(qparams.dequantize(codes, torch.float32).numpy(), literal(qparams, codes))


@pytest.mark.parametrize("text", [*K_QUANTS, *MINIMA])
@given(x=matrices(rows=3, columns=256))
def test_no_weight_is_off_by_more_than_its_step_and_the_rounding_of_scales(text: str, x: Tensor) -> None:
    x = x.clamp(-100, 100)
    x = torch.where(x.abs() < 1e-2, 0, x)
    spec = QuantSpec.parse(text)
    qparams = observe_tensor(x, spec, "w")
    error = (qparams.fake_quantize(x) - x).abs()
    # of scales half of 1 / 63 of the largest is lost over all levels, and of minima as much
    lost = float(x.abs().max()) * (0.05 if spec.super_blocks else 2e-3)
    scale = qparams.scale.abs().reshape(-1, qparams.scale.shape[-1]) if spec.granularity != "tensor" else qparams.scale
    assert bool((error <= 0.51 * scale.max() + lost).all())


@given(x=matrices(rows=2, columns=256))
def test_minima_span_what_lies_on_one_side_of_zero(x: Tensor) -> None:
    x = x.abs().clamp(0, 100) + 1000
    spec = QuantSpec.parse("uint8:g32:asym:zero=min")
    groups = x.unflatten(1, (-1, 32))
    # no step is so small that the numbers lie more than 2 ** 14 of them from zero
    width = torch.maximum((groups.amax(-1) - groups.amin(-1)) / 255, groups.amax(-1) / 2**14)
    error = (observe_tensor(x, spec, "w").fake_quantize(x) - x).abs().unflatten(1, (-1, 32))
    assert bool((error <= 0.51 * width[..., None] + 5e-4).all())


@given(data=st.data())
def test_integers_and_steps_are_found_again(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(K_QUANTS))
    spec = QuantSpec.parse(text)
    kind = dtype_named(spec.scale_dtype)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    codes = torch.randint(kind.qmin, kind.qmax + 1, (4, spec.groups_at_once * 2), generator=generator)
    step = (torch.rand(4, 2, generator=generator) * 10.0 ** data.draw(st.integers(-6, 3))).half()
    values = put_together(codes, step, spec)
    assert torch.equal(put_together(*taken_apart(values, spec), spec), values)


def test_what_is_no_such_product_is_told() -> None:
    spec = QuantSpec.parse("q4_k")
    values = torch.linspace(1, 2, 8).sqrt()[None]
    assert torch.equal(
        put_together(*taken_apart(round_super(values, spec, 1), spec), spec), round_super(values, spec, 1)
    )
    with pytest.raises(SpecError, match="no integers times a number in half precision"):
        taken_apart(values, spec)
    stored = observe_tensor(torch.randn(2, 256), spec, "w").tensors("w")
    for name in ("w_super_scale", "w_zero_point_super_scale"):
        with pytest.raises(ModelError, match=f"no {name} for"):
            QParams.from_tensors("w", {key: value for key, value in stored.items() if key != name}, spec)


def test_a_group_of_zeros_among_others() -> None:
    x = torch.randn(2, 256)
    x[0, 32:64] = 0
    x[1] = 0
    for text in K_QUANTS:
        fake = observe_tensor(x, QuantSpec.parse(text), "w").fake_quantize(x)
        assert not fake[1].any() and not fake[0, 32:64].any() and fake[0].any()


def test_the_width_is_that_of_super_blocks() -> None:
    assert scale_shape((3, 512), QuantSpec.parse("q4_k")) == (3, 16)
    with pytest.raises(SpecError, match="super-blocks of 256 do not divide the width 384"):
        scale_shape((3, 384), QuantSpec.parse("q6_k"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int4:channel:scale=int8", "static groups of a size that divides 256"),
        ("int4:g48:scale=int8", "static groups of a size that divides 256"),
        ("int4:g32:scale=int8:dyn", "static groups of a size that divides 256"),
        ("fp4_e2m1:g32:scale=uint6", "for signed integers, or asymmetric ones"),
        ("uint4:g32:sym:scale=uint6", "for signed integers, or asymmetric ones"),
        ("uint4:g32:asym:scale=uint6", "add zero=min"),
        ("int4:g32:sym:signed:scale=uint6", "with scales of a float dtype or int8"),
        ("int4:g32:asym:zero=min", "for unsigned integers"),
        ("uint4:g32:sym:zero=min", "for asymmetric integers"),
        ("uint4:g32:asym:zero=min:dyn", "static specs of weights"),
        ("uint4:g32:asym:zero=min:scale=fp8_e4m3", "in float32, bfloat16, float16, not fp8_e4m3"),
        ("q4_k:g64", "q4_k says the granularity itself"),
    ],
)
def test_what_contradicts_itself_is_refused(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        QuantSpec.parse(text)
