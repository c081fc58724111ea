"""AutoRound: a step against autograd on the paper's formula in float64, and what the walk gives it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import wrapq
from tests.algorithms.test_corrections import batches, logits
from tests.conftest import build_model
from wrapq import PTQConfig, convert, prepare
from wrapq.algorithms.autoround import AutoRound, Perturbed
from wrapq.algorithms.rtn import RTN
from wrapq.errors import CalibrationError, PlanError
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.model import iter_quantizers
from wrapq.wrappers.quantizer import WeightQuantizer

FAST = {"algorithm": "autoround", "iterations": 30}


def literal(weight, v, alpha, beta, spec):
    """Equations 3 to 6 for one row under one scale, in float64, every rounding straight through."""
    qmin, qmax = spec.dtype.qmin, spec.dtype.qmax
    ste = lambda x: x + (x.round() - x).detach()  # noqa: E731
    high, low = weight.max() * alpha, weight.min() * beta
    if spec.symmetric:
        scale, zero = torch.maximum(low.abs(), high.abs()) / ((qmax - qmin) / 2), 0.0
        scale = -scale if spec.signed_scale and high > -low else scale
    else:
        scale = (high - low) / (qmax - qmin)
        zero = ste(-low / scale) + qmin
    return scale * (torch.clamp(ste(weight / scale + v) + zero, qmin, qmax) - zero)


@pytest.mark.parametrize("text", ["int4:channel:sym", "uint4:channel:asym", "int2:g16:sym", "int2:g16:sym:signed"])
def test_weights_and_gradients_are_those_of_the_paper(text):
    spec, generator = QuantSpec.parse(text), torch.Generator().manual_seed(0)
    weight, toward = (torch.randn(6, 32, generator=generator) for _ in range(2))
    made = Perturbed(weight, spec, "w")
    made.v = (torch.rand(6, 32, generator=generator) - 0.5).requires_grad_()
    made.low = (0.7 + 0.3 * torch.rand(made.low.shape, generator=generator)).requires_grad_()
    made.high = (0.7 + 0.3 * torch.rand(made.high.shape, generator=generator)).requires_grad_()
    groups = made.low.numel()
    leaves = [t.detach().double().requires_grad_() for t in (made.v, made.low, made.high)]
    v, low, high = (t.reshape(groups, -1) for t in leaves)
    rows = weight.double().reshape(groups, -1)
    expected = torch.stack([literal(rows[i], v[i], high[i], low[i], spec) for i in range(groups)])
    got = made.quantized()
    torch.testing.assert_close(got.double(), expected.reshape(6, 32), rtol=1e-5, atol=1e-5)
    theirs = torch.autograd.grad((expected.reshape(6, 32) * toward.double()).sum(), leaves, allow_unused=True)
    ours = torch.autograd.grad((got * toward).sum(), (made.v, made.low, made.high), allow_unused=True)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), reference.reshape(mine.shape), rtol=1e-3, atol=1e-4)


def test_what_is_learned_is_what_is_stored():
    made = Perturbed(torch.randn(8, 32), QuantSpec.parse("uint3:g16:asym"), "w")
    made.v.uniform_(-0.5, 0.5)
    made.low.uniform_(0.5, 1)
    made.high.uniform_(0.5, 1)
    rounded = made.rounded({})
    torch.testing.assert_close(rounded.qparams.dequantize(rounded.integers, torch.float32), made.quantized())


def rounded(family: str, stack: dict[str, object], activation: str | None = None) -> nn.Module:
    overrides = {} if family in ("gpt2", "bert", "gemma2") else {"lm_head": None}
    config = PTQConfig(weight="int3:channel:sym", activation=activation, overrides=overrides)
    prepared = prepare(build_model(family), config)
    given = batches() if family != "bert" else [{"input_ids": b["input_ids"]} for b in batches()]
    wrapq.calibrate(prepared, given, stack)
    return prepared


def lost(family: str, model: nn.Module) -> float:
    def run(m: nn.Module) -> torch.Tensor:
        return torch.cat([m(input_ids=b["input_ids"]).logits.flatten() for b in batches()])

    return float((run(model) - run(build_model(family))).square().mean())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert"])
def test_families_gain(family):
    assert lost(family, rounded(family, {"r": FAST})) < 0.8 * lost(family, rounded(family, {"r": "rtn"}))


@pytest.mark.parametrize("activation", ["int8:token:dyn", "uint8:tensor:asym"])
def test_gradients_go_through_quantized_activations(activation):
    learned, nearest = (lost("llama", rounded("llama", {"r": r}, activation)) for r in (FAST, "rtn"))
    assert learned < 0.8 * nearest


def test_the_same_seed_gives_the_same_bits_and_conversion_keeps_them(threads: None):
    torch.manual_seed(5)
    first = logits(rounded("llama", {"r": FAST}))
    torch.manual_seed(5)
    second = rounded("llama", {"r": FAST})
    assert torch.equal(logits(second), first)
    assert torch.equal(logits(convert(second)), first)


def test_a_repair_after_it_sees_what_it_chose():
    prepared = rounded("llama", {"r": FAST, "l": {"algorithm": "low_rank", "rank": 8}})
    weights = [q for q in iter_quantizers(prepared) if isinstance(q, WeightQuantizer) and "_proj" in q.where]
    assert len(weights) == 14 and all(q.lora_a is not None for q in weights)
    assert lost("llama", prepared) < 0.6 * lost("llama", rounded("llama", {"r": "rtn"}))


def test_a_model_without_blocks_is_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4))
    data = [torch.randn(16, 3, 8) for _ in range(3)]
    expected, errors = torch.cat([model(x) for x in data]), []
    for stack in ({"r": "rtn"}, {"r": {"algorithm": "autoround", "iterations": 60}}):
        prepared = prepare(nn.Sequential(*model), PTQConfig(weight="int3:channel:sym", activation=None))
        wrapq.calibrate(prepared, data, stack)
        errors.append(float((torch.cat([prepared(x) for x in data]) - expected).detach().square().mean()))
    assert errors[1] < 0.6 * errors[0]


def test_the_float_model_is_left_as_it_was():
    model = build_model("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    prepared = prepare(model, PTQConfig(weight="int3:channel:sym", activation=None, overrides={"lm_head": None}))
    wrapq.calibrate(prepared, batches(), {"r": FAST})
    after = dict(wrapq.restore(prepared).named_parameters())
    assert all(torch.equal(after[name], value) and after[name].grad is None for name, value in before.items())


def test_parallel_and_uneven_grids_are_refused():
    prepared = prepare(build_model("llama"), PTQConfig(weight="int4:channel:sym", activation=None))
    with pytest.raises((PlanError, CalibrationError), match="quantized blocks"):
        wrapq.calibrate(prepared, batches(), {"r": FAST}, schedule="parallel")
    assert "evenly" in AutoRound().unsupported(QuantSpec.parse("nf4:g16"))
    assert "integer zero" in AutoRound().unsupported(QuantSpec.parse("int4:g16:asym:zero=float"))
    assert RTN().unsupported(QuantSpec.parse("nf4:g16")) is None
