"""A run on a device of its own mixes no tensor of it with one of the CPU, and ends with the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import wrapq
from tests.apart import APART, Apart
from tests.models import random_model
from wrapq.engine import run as engine
from wrapq.engine.record import RunResult

SMALL = (
    "calibration=demo",
    "calibration.samples=4",
    "calibration.batch_size=2",
    "calibration.seq_len=48",
    "evaluation.tokens=256",
    "evaluation.seq_len=64",
    "tracking=none",
    "runtime.kernels=reference",
    "runtime.device=cpu",
)
GROUPS = "rules.linear.weight=int4:g32:sym"
FLOAT_ZEROS = "rules.linear.weight='uint4:g32:asym:zero=float'"
MINIMA = "rules.linear.weight='uint4:g32:asym:zero=min'"
RANGES = ("rules.linear.input=int8:tensor:asym", "+algorithm@stack.ranges=ranges")
OBSERVERS = ("mse", "entropy", "percentile", "ema")
FP8_BLOCKS = ("rules.linear.weight=fp8_e4m3:b32x32", "rules.linear.input=fp8_e4m3:g32:dyn")
CASES = {
    "gptq": ("llama", "w4a16_gptq", (GROUPS, *RANGES)),
    "gptaq, streamed": ("qwen3", "w4a16_gptq", (GROUPS, "stack.round.asymmetric=0.5", "runtime.load=streaming")),
    "gptq, parallel": ("mixtral", "w4a16_gptq", (GROUPS, "calibration.schedule=parallel")),
    "awq": ("llama", "w4a16_awq", (GROUPS, "stack.scale.replay=2")),
    "autoround": ("llama", "w4a16_autoround", (GROUPS, "stack.round.iterations=2")),
    "smoothquant": ("opt", "w8a8_smoothquant", ()),
    "rotated": ("llama", "w4a4_rotated_gptq", (GROUPS,)),
    "rotated by learning, cache": ("llama", "w4a8_kv4_rotated", (GROUPS, "stack.rotate.learn=2")),
    "low rank": ("llama", "w4a16_gptq", (GROUPS, "+algorithm@stack.repair=low_rank", "+algorithm@stack.magr=magr")),
    "corrected": ("opt", "w4a16_rtn", ("rules.linear.weight=int4:channel", "+algorithm@stack.fix=bias_correction")),
    "adaround": ("gpt2", "w4a16_rtn", (GROUPS, "algorithm@stack.round=adaround", "stack.round.iterations=2")),
    "hqq": ("llama", "w4a16_rtn", (FLOAT_ZEROS, "algorithm@stack.round=hqq", *RANGES)),
    "least squares": ("llama", "w4a16_rtn", (MINIMA, "algorithm@stack.round=least_squares")),
    "seqmse, nvfp4": ("llama", "w4a16_gptq", ("rules.linear.weight=nvfp4", "algorithm@stack.round=seqmse")),
    "equalized, nf4": ("llama", "w4a16_rtn", ("rules.linear.weight=nf4:g32", "+algorithm@stack.cle=cle", *RANGES)),
    "fp8 blocks": (
        "llama",
        "w4a16_gptq",
        ("rules.linear.weight=fp8_e4m3:b32x32", "rules.linear.input=fp8_e4m3:g32:dyn"),
    ),
    **{name: ("llama", "w8a8_static", (f"rules.linear.input.observer={name}",)) for name in OBSERVERS},
    "everything": ("llama", "npu_w4a16_spinquant_gptq", ()),
}
PLAIN = ("gptq", "gptaq, streamed", "awq", "rotated by learning, cache", "corrected")
"""One case of each kind of algorithm; the others are slow."""


def run(model: Path, outputs: Path, recipe: str, *more: str) -> RunResult:
    result = wrapq.run(recipe, [*SMALL, "model=hf", f"model.path={model}", f"paths.outputs={outputs}", *more])
    assert result is not None
    return result


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(engine, "use_machine", lambda *_: nullcontext(APART))
    with Apart():
        yield


def test_a_mixture_is_refused() -> None:
    with Apart():
        there, here = torch.ones(3, device=APART), torch.ones(3)
        assert there.device == APART and here.device != APART
        assert (there * 2).device == (here.to(APART) + there).device == there[1:].device == nn.Parameter(there).device
        assert torch.zeros_like(there).device == APART and there.cpu().device == here.device
        assert nn.Linear(3, 2).to(APART)(there).device == APART
        for mixture in (lambda: there + here, lambda: nn.Linear(3, 2)(there), lambda: torch.cat([here, there])):
            with pytest.raises(RuntimeError, match="tensors of the CPU"):
                mixture()
        with pytest.raises(RuntimeError, match="generator of the CPU"):
            torch.rand(3, device=APART, generator=torch.Generator())


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in PLAIN else pytest.mark.slow) for c in CASES])
def test_nothing_is_left_on_the_cpu(case: str, tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    family, recipe, more = CASES[case]
    model = random_model(family, tmp_path / "model")
    expected = run(model, tmp_path / "cpu", recipe, *more)
    monkeypatch.setattr(engine, "use_machine", lambda *_: nullcontext(APART))
    with Apart():
        result = run(model, tmp_path / "apart", recipe, *more)
    assert result.digests == expected.digests


def test_statistics_come_back_to_the_device(tmp_path: Path, threads: None, apart: None) -> None:
    model = random_model("llama", tmp_path / "model")
    first, second = (run(model, tmp_path / "out", "w4a16_gptq", GROUPS) for _ in range(2))
    assert any("statistics of 14 of 14 points read" in note for note in second.notes)
    assert second.digests == first.digests
