"""Quality by stages: each stage switches the right points, and the numbers are those of plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.conftest import build_model
from wrapq.algorithms.base import ALGORITHMS
from wrapq.api import PTQConfig, convert, prepare
from wrapq.calibration.assignments import Assignments
from wrapq.calibration.walker import Walker
from wrapq.data.samples import Samples
from wrapq.engine.measure import forward_logits, measure, measure_stages, stages_of
from wrapq.errors import ModelError
from wrapq.graph.blocks import Batch
from wrapq.metrics import FLOAT, QUANTIZED, WEIGHTS
from wrapq.wrappers.model import iter_quantizers
from wrapq.wrappers.quantizer import WeightQuantizer


def samples(rows: int = 3, length: int = 12, padding: int = 0) -> Samples:
    ids = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = None
    if padding:
        mask = torch.ones(rows, length, dtype=torch.bool)
        mask[0, -padding:] = False
    return Samples(ids, mask, "digest")


def conversations() -> Samples:
    """Of three rows the tokens that are scored: two spans, one that reaches the end, one before padding."""
    ids = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(5))
    mask, scored = torch.ones(3, 12, dtype=torch.bool), torch.zeros(3, 12, dtype=torch.bool)
    mask[2, 9:] = False
    scored[0, 2:4] = scored[0, 6:9] = scored[1, 8:] = scored[2, 4:9] = True
    return Samples(ids, mask, "digest", scored=scored)


def quantized_model(config: PTQConfig) -> nn.Module:
    """A wrapped model, every point quantized and none converted."""
    model = prepare(build_model("llama"), config)
    rounders = {q.where: ALGORITHMS.get("rtn")() for q in iter_quantizers(model) if isinstance(q, WeightQuantizer)}
    setters = {q.where: ALGORITHMS.get("ranges")() for q in iter_quantizers(model) if q.where not in rounders}
    data = Batch({"input_ids": samples().input_ids, "use_cache": False}, None)
    Walker(model, Assignments(rounders, setters)).run([data], "parallel")
    return model


def perplexity(model: nn.Module, data: Samples) -> float:
    logits = forward_logits(model, data.input_ids, data.attention_mask).double().log_softmax(-1)
    losses = -logits[:, :-1].gather(-1, data.input_ids[:, 1:, None])[..., 0]
    real = torch.ones_like(losses) if data.attention_mask is None else data.attention_mask[:, 1:]
    return float(torch.exp((losses * real).sum() / real.sum()))


@pytest.mark.parametrize("padding", [0, 5])
def test_each_stage_is_what_the_model_is_there(padding: int) -> None:
    data, config = samples(padding=padding), PTQConfig("int4:channel", "int8:tensor:asym")
    model = quantized_model(config)
    quality = measure_stages(model, data, 2, lambda: None)
    assert list(quality.stages) == [FLOAT, WEIGHTS, QUANTIZED]
    with torch.no_grad():
        assert quality.stages[FLOAT]["perplexity"] == pytest.approx(perplexity(build_model("llama"), data), rel=1e-5)
        weights_only = convert(prepare(build_model("llama"), PTQConfig("int4:channel", None)))
        assert quality.stages[WEIGHTS]["perplexity"] == pytest.approx(perplexity(weights_only, data), rel=1e-5)
        assert quality.stages[QUANTIZED]["perplexity"] == pytest.approx(perplexity(model, data), rel=1e-5)


def test_only_what_is_scored_counts_at_every_stage() -> None:
    data, model = conversations(), quantized_model(PTQConfig("int4:channel", "int8:tensor:asym"))
    quality = measure_stages(model, data, 2, lambda: None)
    with torch.no_grad():
        both = [forward_logits(each, data.input_ids, data.attention_mask) for each in (build_model("llama"), model)]
    p, q = (logits.double().log_softmax(-1)[:, :-1] for logits in both)
    scored = data.scored[:, 1:]
    for stage, log in ((FLOAT, p), (QUANTIZED, q)):
        losses = -log.gather(-1, data.input_ids[:, 1:, None])[..., 0][scored]
        assert quality.stages[stage]["nll"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert quality.stages[stage]["tokens"] == 2 + 3 + 4 + 5
    found = quality.stages[QUANTIZED]
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1)[scored].mean()), rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1))[scored].double().mean()))
    assert measure(build_model("llama"), data, 2, lambda: None)["nll"] == pytest.approx(quality.stages[FLOAT]["nll"])


def test_the_float_stage_has_no_distance_to_itself() -> None:
    quality = measure_stages(quantized_model(PTQConfig()), samples(), 2, lambda: None)
    assert "kl" not in quality.stages[FLOAT]
    assert quality.stages[QUANTIZED]["kl"] > 0


def test_curves_have_a_value_per_block_and_grow_worse() -> None:
    quality = measure_stages(quantized_model(PTQConfig("int4:channel", None)), samples(), 2, lambda: None)
    curve = quality.curves["layer/sqnr_db"]
    assert len(curve) == 2
    assert all(math.isfinite(value) for value in curve)


@pytest.mark.parametrize(
    ("config", "stages"),
    [
        (PTQConfig(), (FLOAT, WEIGHTS, QUANTIZED)),
        (PTQConfig(activation=None), (FLOAT, QUANTIZED)),
        (PTQConfig(weight=None), (FLOAT, QUANTIZED)),
    ],
)
def test_the_middle_stage_only_where_there_is_one(config: PTQConfig, stages: tuple[str, ...]) -> None:
    assert tuple(stages_of(prepare(build_model("llama"), config))) == stages


def test_points_are_switched_back_on() -> None:
    model = quantized_model(PTQConfig())
    measure_stages(model, samples(), 2, lambda: None)
    assert all(quantizer.enabled for quantizer in iter_quantizers(model))


def test_progress_is_told_after_each_batch() -> None:
    calls: list[None] = []
    measure_stages(quantized_model(PTQConfig()), samples(rows=5), 2, lambda: calls.append(None))
    measure(build_model("llama"), samples(rows=5), 2, lambda: calls.append(None))
    assert len(calls) == 3 + 3


def test_batch_size_does_not_change_what_is_measured() -> None:
    model, data = build_model("llama"), samples(rows=5, padding=4)
    found = [measure(model, data, size, lambda: None)["nll"] for size in (1, 2, 5)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = build_model("llama")
    model.get_submodule("model.norm").weight.data[0] = math.nan
    with pytest.raises(ModelError, match="the model gives NaN or infinite logits on the evaluation data"):
        measure(model, samples(), 2, lambda: None)
