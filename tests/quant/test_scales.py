"""Scales: their formats, microscaling, global scales, blocks and heads."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.quant.strategies import matrices
from wrapq.errors import CalibrationError, SpecError
from wrapq.observers.base import make_observer, observe_tensor
from wrapq.quant import affine
from wrapq.quant.casts import round_to_format
from wrapq.quant.packing import pack, unpack
from wrapq.quant.qparams import QParams
from wrapq.quant.short_form import ALIASES
from wrapq.quant.spec import QuantSpec

MX = [name for name in ALIASES if name.startswith("mx")]
EVERY = [
    *ALIASES,
    "fp8_e4m3:tensor",
    "fp8_e5m2:channel",
    "fp8_e4m3:b128x128",
    "fp8_e4m3:b5x7",
    "int8:b4x32",
    "uint4:b3x10:asym",
    "nf4:g32",
    "fp6_e2m3:channel",
    "fp6_e3m2:g16:scale=bfloat16",
    "int4:g32:scale=float16",
    "uint4:g32:asym:scale=bfloat16",
    "int4:g32:scale=fp8_e4m3",
    "fp4_e2m1:g16:scale=fp8_e4m3",
    "uint4:g32:asym:scale=float16:zero=min",
]


COLUMNS = 256
"""Of a super-block."""


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(data=st.data())
def test_fake_quantize_is_dequantize_of_packed_codes_to_the_bit(text: str, dtype: torch.dtype, data: st.DataObject):
    x = data.draw(matrices(rows=7, columns=COLUMNS, dtype=dtype)).clamp(-60000, 60000)
    qparams = observe_tensor(x, QuantSpec.parse(text), "w")
    codes = qparams.quantize(x)
    kind = qparams.spec.dtype
    assert codes.dtype == affine.storage_dtype(kind)
    assert torch.equal(unpack(pack(codes, kind), kind, COLUMNS), codes)
    fake = qparams.fake_quantize(x)
    assert fake.dtype == dtype and fake.shape == x.shape
    assert torch.equal(bits(fake), bits(qparams.dequantize(codes, dtype)))


@pytest.mark.parametrize("text", EVERY)
@given(x=matrices(rows=7, columns=COLUMNS))
def test_quantizing_what_was_quantized_changes_nothing(text: str, x: Tensor):
    qparams = observe_tensor(x, QuantSpec.parse(text), "w")
    once = qparams.fake_quantize(x)
    assert torch.equal(qparams.fake_quantize(once), once)


@pytest.mark.parametrize("text", EVERY)
@given(x=matrices(rows=7, columns=COLUMNS))
def test_parameters_survive_storage_in_the_scale_dtype(text: str, x: Tensor):
    qparams = observe_tensor(x, QuantSpec.parse(text), "w")
    stored = qparams.tensors("weight")
    expected = {"e8m0": torch.uint8, "fp8_e4m3": torch.float8_e4m3fn, "bfloat16": torch.bfloat16}
    expected |= dict.fromkeys(("int8", "uint6"), torch.int32)
    kind = expected.get(qparams.spec.scale_dtype, getattr(torch, qparams.spec.scale_dtype, None))
    assert stored["weight_scale"].dtype == kind
    assert QParams.from_tensors("weight", stored, qparams.spec).digest() == qparams.digest()
    assert qparams.scale.shape == affine.scale_shape(x.shape, qparams.spec)


def mx_reference(block: list[float], qparams: QParams) -> tuple[float, list[float]]:
    """OCP MX specification 1.0, section 6.3, in Python's arithmetic: shared scale and elements.

    But for the scale of a block whose largest would saturate: the next one, as compressed-tensors has it.
    """
    emax = {"fp8_e4m3": 8, "fp8_e5m2": 15, "fp6_e2m3": 2, "fp6_e3m2": 4, "fp4_e2m1": 2, "int8": 6}[
        qparams.spec.dtype.name
    ]
    largest = max(map(abs, block))
    exponent = math.floor(math.log2(largest)) if largest else emax
    scale = 2.0 ** (exponent - emax)
    if largest >= 1.75 * 2.0**exponent and largest >= qparams.spec.dtype.half_range * scale:
        scale *= 2
    if qparams.spec.dtype.kind == "int":
        return scale, [min(max(round(v / scale), -128), 127) * scale for v in block]
    return scale, (round_to_format(torch.tensor(block) / scale, qparams.spec.dtype) * scale).tolist()


@pytest.mark.parametrize("text", MX)
@given(x=matrices(rows=3, columns=64))
def test_microscaling_is_that_of_the_specification(text: str, x: Tensor):
    qparams = observe_tensor(x, QuantSpec.parse(text), "w")
    fake = qparams.fake_quantize(x)
    for block, scale, got in zip(
        x.reshape(-1, 32).tolist(), qparams.scale.flatten().tolist(), fake.reshape(-1, 32).tolist(), strict=True
    ):
        assert (scale, got) == mx_reference(block, qparams)


def test_e8m0_is_exact_at_powers_of_two_and_at_its_ends():
    spec = QuantSpec.parse("fp8_e4m3:tensor:scale=e8m0")
    for exponent in range(-126, 128):
        for factor, above in ((1, 0), (1.75 - 2**-23, 0), (1.75, 1), (2 - 2**-23, 1)):
            high = torch.tensor([factor * 2.0**exponent])
            scale, _ = affine.range_to_qparams(-high, high, spec)
            assert scale.item() == 2.0 ** min(max(exponent + above - 8, -126), 118)
    scale, _ = affine.range_to_qparams(torch.zeros(1), torch.tensor([1e-42]), spec)
    assert scale.item() == 2.0**-126


@pytest.mark.parametrize("text", ["mxfp4", "nvfp4", "int4:g32:scale=fp8_e4m3", "fp8_e4m3:g32", "nf4:g32"])
@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-30, 3.3e38, -2.5])
def test_extreme_and_constant_tensors_stay_finite(text: str, value: float):
    x = torch.full((2, 64), value)
    x[0, 0] = 0
    fake = observe_tensor(x, QuantSpec.parse(text), "w").fake_quantize(x)
    assert bool(fake.isfinite().all())
    if 1e-30 < abs(value) < 3e38 and "int4" not in text:
        torch.testing.assert_close(fake[1], x[1], rtol=0.2, atol=0)
    assert not affine.dynamic_fake_quantize(torch.zeros(2, 64), QuantSpec.parse(f"{text}:dyn")).any()


def test_a_global_scale_makes_the_widest_group_448():
    torch.manual_seed(0)
    x = torch.randn(16, 64)
    qparams = observe_tensor(x, QuantSpec.parse("nvfp4"), "w")
    torch.testing.assert_close(qparams.global_scale, (448 * 6 / x.abs().max()).reshape(1))
    assert qparams.scale.max().item() == 448
    ideal = x.reshape(16, 4, 16).abs().amax(-1) / 6
    torch.testing.assert_close(qparams.effective_scale, ideal, rtol=1 / 16, atol=0)


def test_local_groups_follow_the_tensor_and_the_global_scale_the_calibration():
    spec, torch_seed = QuantSpec.parse("nvfp4:local"), torch.manual_seed(0)
    observer = make_observer(spec)
    observer.update(torch.randn(2, 5, 32, generator=torch_seed))
    observer.update(torch.full((1, 1, 32), 10.0))
    qparams = observer.qparams("input")
    assert qparams.global_scale.item() == pytest.approx(448 * 6 / 10) and set(qparams.tensors("input")) == {
        "input_global_scale"
    }
    x = torch.randn(2, 3, 32) * torch.tensor([0.1, 1, 5]).reshape(1, 3, 1)
    assert torch.equal(qparams.fake_quantize(x), affine.dynamic_fake_quantize(x, spec, qparams.global_scale))
    alone = torch.cat([qparams.fake_quantize(x[:, i : i + 1]) for i in range(3)], 1)
    assert torch.equal(qparams.fake_quantize(x), alone)  # no token depends on another
    assert QParams.from_tensors("input", qparams.tensors("input"), spec).digest() == qparams.digest()


@pytest.mark.parametrize("shape", [(8, 12), (7, 11), (3, 5), (1, 1), (2, 9, 10)])
@pytest.mark.parametrize("text", ["int8:b4x6", "uint4:b4x6:asym", "fp8_e4m3:b4x6"])
def test_blocks_are_quantized_one_by_one_edges_included(text: str, shape: tuple[int, ...]):
    x, spec = torch.randn(shape) + 0.5, QuantSpec.parse(text)
    low, high = affine.reduce_range(x, spec)
    parameters = affine.range_to_qparams(low, high, spec)
    codes = affine.quantize(x, *parameters, spec)
    one = QuantSpec(spec.dtype, symmetric=spec.symmetric)
    for lead in [0, 1] if x.dim() == 3 else [...]:
        for i in range(0, shape[-2], 4):
            for j in range(0, shape[-1], 6):
                tile = x[lead, i : i + 4, j : j + 6] if x.dim() == 3 else x[i : i + 4, j : j + 6]
                at = (lead, i // 4, j // 6) if x.dim() == 3 else (i // 4, j // 6)
                assert low[at] == tile.min() and high[at] == tile.max()
                alone = affine.quantize(tile, *affine.range_to_qparams(*affine.reduce_range(tile, one), one), one)
                got = codes[lead, i : i + 4, j : j + 6] if x.dim() == 3 else codes[i : i + 4, j : j + 6]
                assert torch.equal(got, alone)
    assert affine.scale_shape(shape, spec) == tuple(low.shape)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "entropy"])
def test_heads_have_ranges_of_their_own(observer: str):
    x = torch.randn(2, 3, 5, 8) * torch.tensor([1.0, 10.0, 0.1]).reshape(1, 3, 1, 1)
    heads = make_observer(QuantSpec.parse(f"int8:head:{observer}"))
    heads.update(x)
    heads.update(x[..., :2, :])
    scale = heads.qparams("key").scale
    assert scale.shape == (3, 1, 1)
    for i in range(3):
        alone = make_observer(QuantSpec.parse(f"int8:tensor:{observer}{'' if observer == 'minmax' else '(bins=512)'}"))
        alone.update(x[:, i])
        alone.update(x[:, i, :2])
        torch.testing.assert_close(scale[i].flatten(), alone.qparams("key").scale)


def test_what_makes_no_sense_is_refused():
    for text in (
        "nf4:asym",
        "int8:asym:scale=e8m0",
        "int8:global",
        "int4:g16:local",
        "int8:scale=fp7",
        "mxfp4:channel",
    ):
        with pytest.raises(SpecError):
            QuantSpec.parse(text)
    with pytest.raises(SpecError, match="fixed blocks are for weights"):
        make_observer(QuantSpec.parse("int8:b4x4")).update(torch.randn(2, 8, 8))
    with pytest.raises(SpecError, match="heads of a tensor with 2 dimensions"):
        affine.scale_shape((3, 4), QuantSpec.parse("int8:head"))
    with pytest.raises(SpecError, match="a weight does not change"):
        observe_tensor(torch.randn(2, 16), QuantSpec.parse("nvfp4:local"), "w")
    with pytest.raises(CalibrationError, match="NaN"):
        observe_tensor(torch.full((2, 32), math.nan), QuantSpec.parse("mxfp4"), "w")
    with pytest.raises(SpecError, match="no global scale"):
        QParams(QuantSpec.parse("nvfp4"), torch.ones(2, 1))


SIGNED = [f"int{bits}:{rest}:signed" for bits in (2, 3, 4, 8) for rest in ("g8", "channel", "tensor")]


@given(x=matrices(), text=st.sampled_from(SIGNED))
def test_signed_scales_spend_the_odd_level_on_the_longer_side(x: Tensor, text: str) -> None:
    spec = QuantSpec.parse(text)
    qparams = observe_tensor(x, spec, "w")
    plain = observe_tensor(x, QuantSpec.parse(text.removesuffix(":signed")), "w")
    assert torch.equal(qparams.scale.abs(), plain.scale)
    x = x.double()
    groups = x.unflatten(1, (-1, 8)) if spec.granularity == "group" else x.unsqueeze(1)
    groups = groups.reshape(1, 1, -1) if spec.granularity == "tensor" else groups
    low, high = groups.amin(-1), groups.amax(-1)
    wide = qparams.scale.double().reshape(*low.shape, 1)
    assert torch.equal(wide.squeeze(-1) < 0, high > -low)
    expected = (groups / wide).round().clamp(spec.dtype.qmin, spec.dtype.qmax) * wide
    error = (qparams.fake_quantize(x.float()).double().reshape(groups.shape) - expected).abs()
    ties = ((groups / wide) % 1 - 0.5).abs() < 1e-5
    assert (error[~ties] <= 1e-4 * wide.abs().expand_as(error)[~ties]).all()
    assert ((expected - groups).abs() <= 0.5001 * wide.abs()).all()


@pytest.mark.parametrize("text", ["uint4:g8:sym", "int4:g8:asym", "int4:token:dyn", "fp8_e4m3:tensor", "mxint8"])
def test_scales_that_cannot_be_signed(text: str) -> None:
    with pytest.raises(SpecError, match=r"signed_scale \(signed\) is for static, symmetric, signed integers"):
        QuantSpec.parse(f"{text}:signed")


@pytest.mark.parametrize("text", ["mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e3m2", "mxfp4"])
def test_microscaling_is_torchaos(text: str):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    config = pytest.importorskip("torchao.prototype.mx_formats.config")
    spec = QuantSpec.parse(text)
    kinds = {
        "fp8_e4m3": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
        "fp4_e2m1": torch.float4_e2m1fn_x2,
        "fp6_e2m3": "fp6_e2m3",
        "fp6_e3m2": "fp6_e3m2",
    }
    x = torch.randn(16, 128) * 10.0 ** torch.randint(-4, 4, (16, 1))
    modes = config.ScaleCalculationMode
    # rounding a block's largest number to the grid, half up, is compressed-tensors' rule where the grid is fp4's
    even = text == "mxfp4"
    scale, data = mx.to_mx(x, kinds[spec.dtype.name], 32, modes.EVEN if even else modes.FLOOR)
    qparams = observe_tensor(x, spec, "w")
    if even:
        assert torch.equal(qparams.tensors("w")["w_scale"].flatten(), scale.view(torch.uint8).flatten())
    else:
        qparams = QParams(spec, scale.float().view_as(qparams.scale), None)
    codes = qparams.quantize(x)
    if spec.dtype.bits == 4:  # two to a byte, the first one low
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    assert torch.equal(codes, data.view(torch.uint8).reshape(codes.shape))
