import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.contracts.observer import ObserverContract, batches
from wrapq.observers.base import make_observer, observe_tensor
from wrapq.observers.histogram import coarsen, count, exponents, power_of_two
from wrapq.quant.spec import QuantSpec


class TestPercentile(ObserverContract):
    name = "percentile"


class TestPercentileNarrow(ObserverContract):
    name = "percentile"
    options = "(bins=16,percentile=90)"


@pytest.mark.parametrize("percentile", [60.0, 90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("text", ["uint8:tensor:asym", "int8:channel@-1"])
def test_quantiles_of_a_stream_are_within_a_bin_of_the_exact_ones(percentile: float, text: str):
    data = batches()
    observer = make_observer(QuantSpec.parse(f"{text}:percentile(percentile={percentile})"))
    for batch in data:
        observer.update(batch)
    rows = torch.cat([batch.flatten(0, 1) for batch in data])
    rows = rows.reshape(-1, 1) if "tensor" in text else rows
    width = observer.histogram()[1].flatten()
    share = torch.tensor([1 - percentile / 100, percentile / 100])
    for got, exact in zip(observer.range(), torch.quantile(rows, share, dim=0), strict=True):
        assert bool(((got.flatten() - exact).abs() <= 2 * width).all())  # the bin of zero is two widths wide


@pytest.mark.parametrize("text", ["uint8:tensor:asym", "int8:channel", "int8:g8"])
def test_quantiles_of_a_tensor_at_hand_are_exact(text: str):
    w, spec = torch.randn(6, 24), QuantSpec.parse(f"{text}:percentile(percentile=90)")
    low, high = make_observer(spec).tensor_range(w)
    rows = w.reshape(low.numel(), -1)
    expected = torch.quantile(rows, torch.tensor([0.1, 0.9]), dim=1)
    torch.testing.assert_close(torch.stack([low.flatten(), high.flatten()]), expected, rtol=1e-5, atol=1e-6)


def test_an_outlier_is_left_out():
    w = torch.randn(100, 100).clamp(-3, 3)
    w[0, 0] = 1000
    loose, tight = (observe_tensor(w, QuantSpec.parse(f"int8:tensor:{o}"), "w") for o in ("minmax", "percentile"))
    assert loose.scale.item() > 100 * tight.scale.item()


@given(st.integers(0, 2**31), st.integers(0, 12), st.sampled_from([16, 64, 512]))
def test_coarsening_gives_the_counts_of_the_wider_bins(seed: int, doublings: int, bins: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 200, generator=generator) * torch.tensor([[1e-3], [1.0], [1e20]])
    spec = QuantSpec.parse("int8:channel")
    exponent = exponents(x.amin(1, keepdim=True), x.amax(1, keepdim=True), bins)
    wide = exponent + doublings
    fine = count(x, exponent, bins, spec)
    assert torch.equal(coarsen(fine, wide - exponent), count(x, wide, bins, spec))
    assert fine.sum(1).tolist() == [200, 200, 200]
    assert bool((x.abs().amax(1, keepdim=True) < bins * power_of_two(exponent)).all())
    assert bool((x.abs().amax(1, keepdim=True) >= bins // 2 * power_of_two(exponent)).all())


def test_a_mirrored_stream_has_the_mirrored_histogram():
    x, spec = torch.randn(4, 100), QuantSpec.parse("int8:channel")
    exponent = exponents(x.amin(1, keepdim=True), x.amax(1, keepdim=True), 64)
    assert torch.equal(count(x, exponent, 64, spec).flip(1), count(-x, exponent, 64, spec))


def test_powers_of_two_are_exact():
    exponent = torch.arange(-126, 128, dtype=torch.int32)
    assert power_of_two(exponent).tolist() == [2.0**k for k in range(-126, 128)]


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1.0, 3e38])
def test_magnitudes_at_the_ends_of_float32_are_counted(scale: float):
    observer = make_observer(QuantSpec.parse("int8:tensor:percentile(percentile=100)"))
    for step in (1e-3, 1.0):
        observer.update(torch.tensor([-scale * step, scale * step, 0.0]))
    assert int(observer.histogram()[0].sum()) == 6
    assert torch.equal(observer.range()[1], observer.bounds()[1])
