"""Scales and minima by least squares: against a search over all of them, and against ggml's own rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.models import DEMO
from wrapq.algorithms.gptq import GPTQ
from wrapq.algorithms.least_squares import LeastSquares, fitted_ranges, unfitted
from wrapq.errors import CalibrationError
from wrapq.observers.base import observe_tensor
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.input import InputStatistics

K_QUANTS = ("q4_k", "q5_k", "q6_k")
NEARLY = 1.05
"""What a search over a fine grid of scales and minima finds more."""


def weights(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "shipped":
        return load_file(f"{DEMO}/model.safetensors")["model.layers.1.mlp.down_proj.weight"].float()[:64]
    x = torch.randn(64, 512, generator=generator) * 0.02
    return x.abs() if kind == "positive" else x * (1 + 8 * (torch.rand(64, 512, generator=generator) > 0.98))


def importance(columns: int) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 4 + 0.01


def lost(weight: Tensor, values: Tensor, h: Tensor) -> Tensor:
    """The weighted squared error of each row."""
    return ((values - weight).double().square() * h).sum(1)


def searched(row: np.ndarray, h: np.ndarray, symmetric: bool) -> float:
    """The least error of a group in 8 levels, over a fine grid of scales and minima."""
    best, spans = np.inf, np.linspace(0.5, 1.1, 61)
    lows = [0.0] if symmetric else [low * row.min() for low in np.linspace(0.5, 1.1, 61)]
    for low in lows:
        for span in spans:
            whole = 2 * np.abs(row).max() / 7 if symmetric else (row.max() - row.min()) / 7
            for scale in (span * whole, -span * whole) if symmetric else (span * whole,):
                q = np.clip(np.round((row - low) / scale), *((-4, 3) if symmetric else (0, 7)))
                best = min(best, float((h * (q * scale + low - row) ** 2).sum()))
    return best


@pytest.mark.parametrize("text", ["uint3:g16:asym:zero=min", "int3:g16:sym:signed"])
def test_it_finds_what_a_search_over_all_finds(text: str) -> None:
    spec, weight, h = QuantSpec.parse(text), weights("outliers")[:4, :32], importance(32)
    found = lost(weight, fitted_ranges(weight, spec, h, "w").fake_quantize(weight), h)
    groups = weight.double().unflatten(1, (-1, 16)).numpy(), h.double().unflatten(0, (-1, 16)).numpy()
    best = [sum(searched(row[i], groups[1][i], spec.symmetric) for i in range(2)) for row in groups[0]]
    assert float(found.sum()) <= NEARLY * sum(best)
    whole = lost(weight, observe_tensor(weight, spec, "w").fake_quantize(weight), h)
    assert float(whole.sum()) > 1.3 * sum(best)  # so that there was something to find


@pytest.mark.parametrize("kind", ["outliers", "positive", "shipped"])
@pytest.mark.parametrize("text", [*K_QUANTS, "uint4:g32:asym:scale=float16:zero=min", "int4:g32:sym:scale=float16"])
def test_no_super_block_loses_more_than_in_the_whole_range(text: str, kind: str) -> None:
    spec, weight = QuantSpec.parse(text), weights(kind)
    h = importance(weight.shape[1])
    plain, fitted = observe_tensor(weight, spec, "w"), fitted_ranges(weight, spec, h, "w")
    before, after = lost(weight, plain.fake_quantize(weight), h), lost(weight, fitted.fake_quantize(weight), h)
    assert bool((after <= before * (1 + 1e-5)).all()) and float(after.sum()) < 0.85 * float(before.sum())
    assert QParams.from_tensors("w", fitted.tensors("w"), spec).digest() == fitted.digest()


@pytest.mark.parametrize("kind", ["outliers", "positive", "shipped"])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("text", K_QUANTS)
def test_it_loses_no_more_than_ggml_with_the_same_importance(text: str, even: bool, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp", reason="pip install 'wrapq[gguf]' compiles llama.cpp, which takes minutes")
    from tests.export.ggml_rounding import rounded_by_ggml

    weight = weights(kind)
    h = torch.ones(weight.shape[1]) if even else importance(weight.shape[1])
    blocks = rounded_by_ggml(weight, text, h)
    theirs = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[text.upper()]))
    ours = fitted_ranges(weight, QuantSpec.parse(text), h, "w").fake_quantize(weight)
    assert float(lost(weight, ours, h).sum()) < float(lost(weight, theirs, h).sum())


def test_columns_that_no_data_reached(recwarn: pytest.WarningsRecorder) -> None:
    weight, spec = weights("outliers"), QuantSpec.parse("q4_k")
    h = importance(512)
    h[:300] = 0
    error = (fitted_ranges(weight, spec, h, "w").fake_quantize(weight) - weight).norm() / weight.norm()
    assert error < 0.2
    nothing = fitted_ranges(weight, spec, torch.zeros(512), "w")
    assert nothing.digest() == fitted_ranges(weight, spec, torch.ones(512), "w").digest()
    weight[3, 5] = torch.nan
    with pytest.raises(CalibrationError, match="layer: the data holds NaN"):
        fitted_ranges(weight, spec, h, "layer")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int8:channel", "groups of integers"),
        ("nf4:g32", "groups of integers"),
        ("uint4:g32:asym", "add zero=min"),
        ("int4:g32:asym", "symmetric signed ones or unsigned ones with minima"),
        ("mxint8", "too few values"),
        ("int4:g32:mse", "the observer mse would have no effect"),
    ],
)
def test_what_it_does_not_fit(text: str, reason: str) -> None:
    assert reason in (LeastSquares().unsupported(QuantSpec.parse(text)) or "")
    assert all(unfitted(QuantSpec.parse(name)) is None for name in K_QUANTS)


@pytest.mark.parametrize("text", ["q4_k", "q6_k"])
def test_gptq_goes_on_from_there(text: str) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, spec = weights("shipped")[:16, :256], QuantSpec.parse(text)
    mixing = torch.randn(64, 256, generator=generator)
    x = torch.randn(2000, 64, generator=generator) @ mixing + 0.3 * torch.randn(2000, 256, generator=generator)
    statistics = InputStatistics(("hessian", "mean_square"))
    statistics.add(x)

    def output_error(rounder: LeastSquares | GPTQ) -> float:
        codes, qparams, _ = rounder.round(weight, spec, "w", statistics)
        values = qparams.dequantize(codes, torch.float32)
        assert torch.equal(qparams.fake_quantize(values), values)  # on its grid
        return float(((values - weight) @ x.T).square().sum())

    assert output_error(GPTQ()) < 0.6 * output_error(LeastSquares())
