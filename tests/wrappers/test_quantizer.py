"""One point's lifecycle, and what counts as a real token."""

import pytest
import torch
from torch import nn

from wrapq import PTQConfig, convert, padding, prepare
from wrapq.errors import CalibrationError, LifecycleError
from wrapq.observers.forward_context import forward_context, in_context
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.quantizer import Quantizer, State, WeightQuantizer, real_tokens

STATIC, DYNAMIC = QuantSpec.parse("uint8:tensor:asym"), QuantSpec.parse("int8:token:dyn")


def test_float_then_observing_then_quantized():
    x = torch.randn(2, 3, 4)
    point = Quantizer(STATIC, "layer.input")
    assert point.state is State.FLOAT and point(x) is x
    with pytest.raises(LifecycleError, match=r"layer\.input has not been observing"):
        point.freeze()
    point.observe()
    with pytest.raises(LifecycleError, match=r"layer\.input .* saw no data"):
        point.freeze()
    with pytest.raises(LifecycleError, match=r"layer\.input has no quantization parameters: it is observing"):
        _ = point.qparams
    assert point(x) is x
    point.freeze()
    assert point.state is State.QUANTIZED and point.observer is None
    assert torch.equal(point(x), point.qparams.fake_quantize(x)) and not torch.equal(point(x), x)
    point.enabled = False
    assert point(x) is x
    point.observe()
    assert point.scale is None and point.observer.empty


def test_a_dynamic_point_needs_no_data():
    point = Quantizer(DYNAMIC, "layer.input")
    point.observe()
    x = torch.randn(2, 3, 4)
    assert point(x) is x
    point.freeze()
    assert not torch.equal(point(x), x)


def test_a_weight_point_needs_a_rounding_algorithm():
    point = WeightQuantizer(QuantSpec.parse("int4:channel"), "layer.weight")
    point.observe()
    with pytest.raises(LifecycleError, match=r"layer\.weight .* has not been rounded"):
        point.freeze()


@pytest.mark.parametrize("spec", [STATIC, DYNAMIC], ids=str)
def test_a_state_dict_carries_whether_the_point_quantizes(spec: QuantSpec):
    points = [Quantizer(spec, "layer.input") for _ in range(3)]
    x = torch.randn(2, 3, 4)
    for point in points:
        point.observe()
        point(x)
    points[0].freeze()
    points[1].load_state_dict(points[0].state_dict())
    assert points[1].state is State.QUANTIZED and torch.equal(points[1](x), points[0](x))
    points[1].load_state_dict(points[0].state_dict())
    assert torch.equal(points[1](x), points[0](x))
    assert not points[2].state_dict() and points[2].state is State.OBSERVING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type(dtype: torch.dtype):
    point = Quantizer(STATIC, "layer.input")
    point.observe()
    x = torch.randn(2, 3, 4).to(dtype)
    point(x)
    point.freeze()
    assert point(x).dtype == dtype and point.scale.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_names_the_point_and_nothing_else_hides_it(bad: float):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    prepared = prepare(model, PTQConfig(activation=None, overrides={"2": {"input": "int8:tensor:asym"}}))
    x = torch.randn(3, 4)
    prepared(x)
    x[1, 2] = bad
    prepared[2](x)
    with pytest.raises(CalibrationError, match=r"^2\.input: the data holds (NaN|inf)"):
        convert(prepared)


MASK = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ("shape", "token_dim", "count"),
    [
        ((2, 3, 5), 1, 3),
        ((1, 3, 5), 1, 2),
        ((2, 4, 3, 5), 2, 3),
        ((6, 5), 1, 3),
        ((2, 7, 5), 1, None),
        ((2, 5), 1, None),
        ((4,), 1, None),
    ],
    ids=[
        "hidden states",
        "shared positions",
        "heads first",
        "batch and tokens in one",
        "other length",
        "pooled",
        "vector",
    ],
)
def test_real_tokens(shape: tuple[int, ...], token_dim: int, count: int | None):
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    assert real_tokens(x, token_dim) is x
    with in_context(padding=MASK):
        kept = real_tokens(x, token_dim)
    if count is None:
        assert kept is x
        return
    real = MASK.any(0) if shape[0] == 1 else MASK.flatten()
    rows = x.movedim(token_dim, 1).reshape(len(real), -1)
    kept = kept.movedim(token_dim - 1, 0)  # tokens are where they were, less one dimension
    assert torch.equal(kept.reshape(count, -1), rows[real])


def test_padding_ends_with_its_block_even_after_an_error():
    with pytest.raises(KeyError), padding(MASK.int()):
        assert forward_context().padding.dtype == torch.bool
        raise KeyError
    assert forward_context().padding is None
