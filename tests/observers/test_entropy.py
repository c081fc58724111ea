import numpy as np
import pytest
import torch

from tests.contracts.observer import ObserverContract
from wrapq.observers.base import make_observer, observe_tensor
from wrapq.observers.entropy import best_threshold, divergence
from wrapq.quant.spec import QuantSpec


class TestEntropy(ObserverContract):
    name = "entropy"


def reference_divergence(counts: np.ndarray, side: int, levels: int) -> float:
    """The same with loops over parts and bins, after onnxruntime's `get_entropy_threshold`."""
    middle = len(counts) // 2
    kept = counts[middle - side + 1 : middle + side].astype(np.float64)
    p = kept.copy()
    p[0] += counts[: middle - side + 1].sum()
    p[-1] += counts[middle + side :].sum()
    q = np.zeros_like(p)
    parts = [[i for i in range(len(kept)) if i * levels // len(kept) == part] for part in range(levels)]
    for members in parts:
        filled = [i for i in members if p[i] > 0]
        for i in filled:
            q[i] = kept[members].sum() / len(filled)
    p, q = p / p.sum(), q / q.sum()
    return sum(a * np.log(a / max(b, 1e-9)) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("side", [9, 20, 33, 64])
def test_divergence_is_that_of_the_definition(side: int):
    counts = torch.randint(0, 40, (3, 127)) * (torch.rand(3, 127) > 0.3)
    got = divergence(counts, side, 16)
    for row, value in zip(counts, got, strict=True):
        assert float(value) == pytest.approx(reference_divergence(row.numpy(), side, 16), rel=1e-4, abs=1e-6)


def test_a_few_outliers_are_cut_and_a_plain_bell_hardly():
    torch.manual_seed(0)
    x = torch.randn(100_000)
    plain, spoiled = (make_observer(QuantSpec.parse("int8:tensor:entropy")) for _ in range(2))
    plain.update(x)
    spoiled.update(torch.cat([x, torch.tensor([60.0, -80.0])]))
    assert float(spoiled.range()[1]) < 10 and float(spoiled.range()[0]) > -10
    assert float(plain.range()[1]) > 3


def test_with_more_codes_than_bins_nothing_is_cut():
    counts = torch.randint(0, 9, (2, 31))
    assert best_threshold(counts, 256, 10).tolist() == [16.0, 16.0]


@pytest.mark.parametrize("text", ["int8:tensor", "int8:channel", "int4:g16", "fp8_e4m3:b8x8"])
def test_a_tensor_at_hand_is_searched_scale_by_scale(text: str):
    w = torch.randn(16, 32)
    whole = observe_tensor(w, QuantSpec.parse(f"{text}:entropy"), "w")
    assert bool((whole.scale <= observe_tensor(w, QuantSpec.parse(text), "w").scale).all())
