"""Walks of data that hardly says anything: what cannot be used is made up for, counted and named, never silent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.calibration.conftest import as_batches, gptq_walker
from tests.calibration.test_walker import Mixture, expert_batches
from tests.conftest import build_model
from wrapq import PTQConfig, prepare
from wrapq.algorithms.base import Rounded
from wrapq.algorithms.rtn import RTN
from wrapq.graph.blocks import Batch
from wrapq.statistics.input import InputStatistics
from wrapq.wrappers.model import convert_model, iter_quantizers, iter_wrapped

WEIGHTS = PTQConfig(weight="int4:channel:sym", activation=None)


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {q.where: q.integers for q in iter_quantizers(model)}


def nearest(model: nn.Module, where: str) -> Tensor:
    """The codes that rounding to nearest gives the weight."""
    module = dict(iter_wrapped(model))[where.removesuffix(".weight")]
    return RTN().round(module.float_matrix(), module.weight_quantizer.spec, where).integers


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_an_expert_that_no_token_reaches_is_rounded_to_nearest_counted_and_named(schedule: str):
    model = prepare(Mixture(), WEIGHTS)
    walker = gptq_walker(model)
    walker.run(expert_batches((0,), (0, 1), (0,)), schedule)
    missed = [f"layers.{block}.mlp.experts.2.weight" for block in (0, 1)]
    said = "no calibration token reached this weight"
    assert walker.result.fallbacks == [f"{where}: {said}; it is rounded to nearest" for where in missed]
    assert {where for where, report in walker.result.reports.items() if "fallback" in report} == set(missed)
    for where in missed:
        assert torch.equal(codes(model)[where], nearest(model, where))
    tokens = 2 * 3
    for block in (0, 1):
        reached = [walker.result.reports[f"layers.{block}.mlp.experts.{i}.weight"]["rows"] for i in (0, 1)]
        assert reached == [3 * tokens, tokens]  # each expert has a Hessian of its own tokens


class Indefinite(InputStatistics):
    """With a Hessian that rounding errors left far from positive definite."""

    def add(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        super().add(x, *args, **kwargs)
        self.sums["hessian"] = torch.eye(x.shape[1]) - 1e9 * torch.ones(x.shape[1], x.shape[1])


def test_a_hessian_that_no_damping_saves_is_a_fallback_by_name(token_batches: list[Tensor], monkeypatch):
    monkeypatch.setattr("wrapq.calibration.forwards.InputStatistics", Indefinite)
    model = prepare(build_model("llama"), WEIGHTS)
    walker = gptq_walker(model)
    walker.run(as_batches(token_batches), "sequential")
    assert len(walker.result.fallbacks) == 2 * 7 + 1
    assert all("is not positive definite whatever the damping" in reason for reason in walker.result.fallbacks)
    where = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(codes(model)[where], nearest(model, where))


@pytest.mark.parametrize("value", [0.0, 0.5], ids=["all zero", "all equal"])
@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_inputs_that_are_all_the_same(value: float, schedule: str):
    """Their Hessian is zero or of rank one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24, bias=False), nn.ReLU(), nn.Linear(24, 8, bias=False))
    config = PTQConfig(weight="int4:channel:sym", activations="uint8:tensor:asym")
    model = prepare(net, config)
    x = torch.full((4, 16), value)
    expected = model(x)
    walker = gptq_walker(model)
    walker.run([Batch({"input": x}) for _ in range(2)], schedule)
    assert not walker.result.fallbacks
    got = convert_model(model)(x)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.02)


def test_one_sample_of_two_tokens():
    """A Hessian of rank two: the weight still has to fit it no worse than rounding to nearest does."""
    ids = torch.tensor([[5, 17]])
    model, plain = (prepare(build_model("llama"), WEIGHTS) for _ in range(2))
    walker, nearest_walker = gptq_walker(model), gptq_walker(plain, _ReportingRTN())
    walker.run(as_batches([ids]), "parallel")
    nearest_walker.run(as_batches([ids]), "parallel")
    assert not walker.result.fallbacks
    errors = {
        where: report["output_error"] for where, report in walker.result.reports.items() if "output_error" in report
    }
    assert len(errors) == 2 * 7 + 1
    for where, error in errors.items():
        assert error <= nearest_walker.result.reports[where]["output_error"] * 1.001, where


class _ReportingRTN(RTN):
    """Rounding to nearest that asks for the Hessian, so that its error is reported on the same data."""

    needs = ("hessian",)

    def round(self, weight: Tensor, spec: object, where: str, statistics: InputStatistics | None = None) -> Rounded:
        return super().round(weight, spec, where)
