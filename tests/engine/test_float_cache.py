"""What the float model gives on evaluation data is read by the next run, which ends with the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.llama.modeling_llama import LlamaAttention

import wrapq
from tests.engine.record import status
from tests.models import random_model
from wrapq.engine import float_cache as float_outputs
from wrapq.engine.record import RunResult
from wrapq.statistics.store import Store

LAYERS, BATCHES = 2, 4
SMALL = ("evaluation.tokens=896", "evaluation.seq_len=128", "evaluation.batch_size=2")
CALIBRATED = (GROUPS := "rules.linear.weight=int4:g32:sym", "calibration.samples=4", "algorithm@stack.round=gptq")
INT8 = "rules.linear.weight=int8:channel:asym"
SAID = "what the float model gives on {} of 4 evaluation batches read from"
SHARE = float_outputs._SHARE


@pytest.fixture(autouse=True)
def any_speed(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """Small models run so fast that reading would not pay."""
    monkeypatch.setattr(float_outputs, "_FASTEST", float("inf"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return random_model("llama", tmp_path / "model")


@contextmanager
def counted() -> Iterator[list[nn.Module]]:
    """The attentions of all models that run meanwhile."""
    ran: list[nn.Module] = []

    def count(module: nn.Module, *_: object) -> None:
        if isinstance(module, LlamaAttention):
            ran.append(module)

    hook = register_module_forward_hook(count)
    try:
        yield ran
    finally:
        hook.remove()


def run(model: Path, *more: str) -> RunResult:
    fixed = [*SMALL, "tracking=none", "runtime.kernels=reference", f"paths.outputs={model.parent / 'outputs'}"]
    return wrapq.run("w4a16_rtn", [*fixed, "model=hf", f"model.path={model}", *more])


def hits(result: RunResult) -> int:
    return next((count for count in range(1, BATCHES + 1) if any(SAID.format(count) in n for n in result.notes)), 0)


def entries(model: Path) -> list[Path]:
    held = Store(model.parent / "outputs" / "cache", 1e9).entries()
    return sorted(entry.path for entry in held if entry.facts().get("kind") == "float model on evaluation data")


def same(result: RunResult, other: RunResult) -> bool:
    page = [status(r.folder) for r in (result, other)]
    return all(page[0][key] == page[1][key] for key in ("stages", "digests")) and all(
        (result.folder / name).read_bytes() == (other.folder / name).read_bytes()
        for name in ("recipe.lock.yaml", "modules.json", "histograms.json")
    )


def test_the_next_recipe_runs_no_block_of_the_float_model(model: Path) -> None:
    with counted() as alone:
        expected = run(model, INT8, "runtime.cache_gb=0")
    with counted() as cold:
        run(model, GROUPS)
    with counted() as warm:
        second = run(model, INT8)
    assert len(alone) == len(cold) == (2 * BATCHES + 3) * LAYERS  # two stages; loading tries it, and saving twice
    assert len(warm) == (BATCHES + 3) * LAYERS
    assert (hits(second), len(entries(model))) == (BATCHES, BATCHES)
    assert same(second, expected)
    assert second.metrics["float"] == expected.metrics["float"]


def test_the_curves_of_blocks_are_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves: list[dict[str, list[float]]] = []
    monkeypatch.setattr("wrapq.tracking.base.Tracker.curves", lambda _, found: curves.append(dict(found)))
    alone, cold, warm = (run(model, GROUPS, *more) for more in (["runtime.cache_gb=0"], [], []))
    assert same(alone, cold) and same(cold, warm) and hits(warm) == BATCHES
    layers = [found for found in curves if "layer/sqnr_db" in found]
    assert len(layers) == 3 and layers[0] == layers[1] == layers[2]


@pytest.mark.slow
def test_calibration_data_does_not_matter_where_nothing_is_transformed(model: Path) -> None:
    run(model, *CALIBRATED)
    assert hits(run(model, *CALIBRATED, "calibration.samples=5")) == BATCHES
    smooth = (*CALIBRATED, "+algorithm@stack.smooth=smoothquant", "rules.linear.input=int8:token:dyn")
    first, again = (run(model, *smooth) for _ in range(2))
    assert (hits(first), hits(again)) == (0, BATCHES)
    assert hits(run(model, *smooth, "calibration.samples=5")) == 0


@pytest.mark.parametrize(
    "change",
    [
        "evaluation.split=calib",
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in ("evaluation.tokens=640", "evaluation.batch_size=3", "model.dtype=bfloat16")
        ),
        "",
    ],
    ids=["text", "tokens", "batches", "dtype", "weights"],
)
def test_another_evaluation_or_model_misses(change: str, model: Path) -> None:
    run(model, GROUPS)
    if not change:
        tensors = load_file(model / "model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    changed = [change] if change else []
    assert hits(found := run(model, GROUPS, *changed)) == 0
    assert same(found, run(model, GROUPS, *changed, "runtime.cache_gb=0"))


def test_attention_that_other_code_runs_is_another_model(model: Path) -> None:
    rule = "+rules.attention={match: {type: Attention}, points: {query: 'int8:tensor:sym'}}"
    points = (rule, "+algorithm@stack.ranges=ranges")
    run(model, *CALIBRATED)
    found = run(model, *CALIBRATED, *points)
    assert hits(found) == 0
    assert same(found, run(model, *CALIBRATED, *points, "runtime.cache_gb=0"))


def test_a_damaged_batch_is_computed_again(model: Path) -> None:
    cold = run(model, GROUPS)
    first, second, *_ = entries(model)
    first.write_bytes(first.read_bytes()[:-1])
    data = bytearray(second.read_bytes())
    data[-5] ^= 1
    second.write_bytes(data)
    again = run(model, GROUPS)
    assert hits(again) == BATCHES - 2 and same(again, cold)
    assert len(entries(model)) == BATCHES and hits(run(model, GROUPS)) == BATCHES


def test_more_than_a_share_of_the_store_is_not_kept(model: Path) -> None:
    total = 896 * LAYERS * 64 * 4
    run(model, GROUPS, f"runtime.cache_gb={0.99 * total / SHARE / 1e9}")
    assert not entries(model)
    run(model, GROUPS, f"runtime.cache_gb={1.01 * total / SHARE / 1e9}")
    assert len(entries(model)) == BATCHES


def test_what_is_computed_as_fast_as_read_is_not_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_outputs, "_FASTEST", 0.0)
    run(model, GROUPS)
    assert not entries(model)


def test_a_store_that_cannot_be_written_costs_time_only(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = f"paths.cache={tmp_path / 'file'}"
    found = run(model, GROUPS, cache)
    assert any(note.startswith("nothing more is kept for later runs: ") for note in found.notes)
    assert same(found, run(model, GROUPS, cache, "runtime.cache_gb=0"))


def test_streamed_blocks_leave_the_store_alone(model: Path) -> None:
    run(model, GROUPS)
    assert hits(run(model, GROUPS, "runtime.load=streaming")) == 0


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("mixtral", "opt", "gemma2", "qwen2_moe")]


@pytest.mark.parametrize("family", ["gpt2", *SLOW])
def test_every_family_gives_the_same(family: str, tmp_path: Path) -> None:
    folder = random_model(family, tmp_path / "model")
    alone, cold, warm = (run(folder, GROUPS, *more) for more in (["runtime.cache_gb=0"], [], []))
    assert same(alone, cold) and same(cold, warm)
    assert hits(warm) == len(entries(folder)) == BATCHES


def test_padded_windows(model: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 2000, (7, 128), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    data = ("evaluation=tokens", f"evaluation.path={tmp_path / 'ids.safetensors'}")
    cold, warm = (run(model, GROUPS, *data) for _ in range(2))
    assert hits(warm) == BATCHES and same(cold, warm)
