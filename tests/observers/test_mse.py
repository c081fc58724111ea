import numpy as np
import pytest
import torch
from torch import Tensor

from tests.contracts.observer import ObserverContract
from wrapq.observers.base import make_observer, observe_tensor
from wrapq.observers.mse import histogram_error, search_range, shrink_factors
from wrapq.quant.affine import fake_quantize, range_to_qparams, reduce_range
from wrapq.quant.spec import QuantSpec


class TestMse(ObserverContract):
    name = "mse"


class TestMseCoarse(ObserverContract):
    name = "mse"
    options = "(bins=64,grid=10,max_shrink=0.5,norm=3.0)"


def heavy_tailed(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(4.0).sample(shape)


def error(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, norm: float) -> Tensor:
    """The error under each scale of a matrix, by quantizing it."""
    difference = (fake_quantize(x, *range_to_qparams(low, high, spec), spec).double() - x.double()).abs() ** norm
    if spec.granularity == "group":
        return difference.unflatten(-1, (-1, spec.group_size)).sum(-1)
    return difference.sum(1, keepdim=True) if spec.granularity == "channel" else difference.sum().reshape(1)


@pytest.mark.parametrize("text", ["int4:g32", "int3:channel", "uint4:g32:asym", "int2:tensor", "uint4:tensor"])
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_a_tensor_at_hand_gets_the_best_candidate(text: str, norm: float):
    x, spec = heavy_tailed(16, 128), QuantSpec.parse(text)
    low, high = reduce_range(x, spec)
    errors = torch.stack([error(x, low * f, high * f, spec, norm) for f in shrink_factors(100, 0.8)])
    found = error(x, *search_range(x, spec, norm=norm), spec, norm)
    torch.testing.assert_close(found, errors.amin(0), rtol=1e-4, atol=0)


def test_rows_do_not_depend_on_how_the_search_is_cut():
    x, spec = heavy_tailed(700, 512), QuantSpec.parse("int4:channel")  # more than one chunk
    low, high = search_range(x, spec, grid=10)
    for row in (0, 511, 512, 699):
        one = search_range(x[row : row + 1], spec, grid=10)
        assert torch.equal(low[row], one[0].flatten()) and torch.equal(high[row], one[1].flatten())
    whole, spec = heavy_tailed(700, 512), QuantSpec.parse("int4:tensor")
    best = min(
        shrink_factors(10, 0.8),
        key=lambda f: float(error(whole, whole.min()[None] * f, whole.max()[None] * f, spec, 2)),
    )
    torch.testing.assert_close(search_range(whole, spec, norm=2, grid=10)[1], whole.max()[None] * best)


@pytest.mark.parametrize("text", ["int4:tensor", "uint4:tensor:asym", "int8:tensor", "int2:channel@-1", "int16:tensor"])
def test_a_stream_comes_close_to_the_best_candidate(text: str):
    x, spec = heavy_tailed(4000, 8), QuantSpec.parse(f"{text}:mse")
    observer = make_observer(spec)
    for batch in x.split(500):
        observer.update(batch)
    matrix, plain = (
        (x.t().contiguous(), QuantSpec.parse("int2:channel")) if "channel" in text else (x, QuantSpec.parse(text))
    )
    low, high = reduce_range(matrix, plain)
    best = torch.stack([error(matrix, low * f, high * f, plain, 2) for f in shrink_factors(100, 0.8)]).amin(0)
    found = error(matrix, *(end.reshape(low.shape) for end in observer.range()), plain, 2)
    assert bool((found <= best * 1.02).all())


@pytest.mark.parametrize("text", ["int4:tensor", "uint4:tensor:asym"])
@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4])
def test_the_expected_error_of_a_histogram_is_that_of_elements_spread_evenly(text: str, norm: float):
    spec, bins = QuantSpec.parse(text), 16
    counts = torch.randint(0, 100, (1, 2 * bins - 1))
    scale, zero_point = range_to_qparams(torch.tensor([[-7.0]]), torch.tensor([[9.3]]), spec)
    edge = np.concatenate([np.arange(-bins, 0), np.arange(1, bins + 1)])
    total = 0.0
    for i, number in enumerate(counts[0].tolist()):
        x = torch.from_numpy(np.linspace(edge[i], edge[i + 1], 4001)[:-1] + (edge[i + 1] - edge[i]) / 8000).float()[
            None
        ]
        total += number * float((fake_quantize(x, scale, zero_point, spec) - x).double().abs().pow(norm).mean())
    got = histogram_error(counts, torch.ones(1, 1), scale, zero_point, spec.dtype, norm)
    assert float(got) == pytest.approx(total, rel=1e-4)


def test_low_bit_weights_improve_and_eight_bits_hardly_change():
    w = heavy_tailed(64, 128)
    for bits, least in ((3, 1.2), (8, 1.0)):
        plain, best = (
            observe_tensor(w, QuantSpec.parse(f"int{bits}:g128:{o}"), "w") for o in ("minmax", "mse(norm=2)")
        )
        ratio = (plain.fake_quantize(w) - w).square().sum() / (best.fake_quantize(w) - w).square().sum()
        assert float(ratio) >= least


def test_half_precision_weights_are_searched_as_they_are():
    w, spec = heavy_tailed(16, 64).bfloat16(), QuantSpec.parse("int4:g32:mse")
    assert observe_tensor(w, spec, "w").digest() == observe_tensor(w.float(), spec, "w").digest()


@pytest.mark.parametrize("observer", ["mse", "percentile", "compare"])
def test_a_global_scale_is_that_of_the_whole_range(observer: str):
    x = heavy_tailed(8, 64)
    spec = QuantSpec.parse(f"nvfp4:{observer}")
    stream = make_observer(spec)
    stream.update(x)
    for qparams in (observe_tensor(x, spec, "w"), stream.qparams("x")):
        assert float(qparams.global_scale) == float(2688 / x.abs().amax())


def test_the_search_is_in_the_global_scale_that_is_kept():
    x, spec = heavy_tailed(8, 64), QuantSpec.parse("nvfp4:mse(norm=2.0)")
    best = observe_tensor(x, spec, "w")
    low, high = reduce_range(x, spec)
    errors = []
    for factor in shrink_factors(100, 0.8):
        parameters = range_to_qparams(low * factor, high * factor, spec, best.global_scale)
        off = fake_quantize(x, *parameters, spec, best.global_scale).double() - x.double()
        errors.append(off.square().unflatten(-1, (-1, 16)).sum(-1))
    found = (best.fake_quantize(x).double() - x.double()).square().unflatten(-1, (-1, 16)).sum(-1)
    torch.testing.assert_close(found, torch.stack(errors).amin(0), rtol=1e-4, atol=0)
