"""The error of a rounded weight is that of the formula in float64, also where the weight is compared in parts."""

from __future__ import annotations

import math

import pytest
import torch

from wrapq.algorithms.base import Rounded
from wrapq.calibration import weight_error
from wrapq.calibration.weight_error import error_report
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.input import InputStatistics


@pytest.mark.parametrize("piece", [1 << 24, 64])
@pytest.mark.parametrize("spec", ["int4:g8:asym", "int8:channel", "int4:tensor", "int4:b4x8"])
def test_it_is_that_of_the_formula(spec: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_error, "_PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(20, 16, generator=generator), torch.randn(50, 16, generator=generator)
    statistics = InputStatistics(frozenset({"hessian"}))
    statistics.add(x)
    qparams = observe_tensor(weight, QuantSpec.parse(spec), "here")
    rounded = Rounded(qparams.quantize(weight), qparams)
    report = error_report(weight, rounded, statistics)
    off = qparams.dequantize(rounded.integers, torch.float64).double() - weight.double()
    outputs, lost = (x.double() @ matrix.T for matrix in (weight.double(), off))
    assert report["output_error"] == pytest.approx(float(lost.square().sum() / outputs.square().sum()), rel=1e-4)
    ratio = float(weight.double().square().sum() / off.square().sum())
    assert report["weight_sqnr_db"] == pytest.approx(10 * math.log10(ratio), rel=1e-5)
    assert report["rows"] == 50 and "output_error" not in error_report(weight, rounded, None)
