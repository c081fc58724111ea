"""A walk that reads statistics instead of gathering them decides the same, and runs nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.calibration.conftest import as_batches, decided, gptq_walker
from tests.conftest import build_model
from wrapq import PTQConfig, prepare
from wrapq.algorithms.base import Rounder
from wrapq.algorithms.gptq import GPTQ, GPTQOptions
from wrapq.algorithms.seqmse import SeqMSE
from wrapq.calibration.walker import Walker
from wrapq.statistics import cache as cache_module
from wrapq.statistics.cache import CachedPoint, StatisticsCache
from wrapq.statistics.cholesky import factorize
from wrapq.statistics.input import InputStatistics
from wrapq.statistics.store import Store

CONFIG = PTQConfig(weight="int4:g16:sym", activations="uint8:tensor:asym", overrides={"model.embed_tokens": None})


def walk(
    store: Store,
    tokens: list[Tensor],
    schedule: str,
    config: PTQConfig = CONFIG,
    rounder: Rounder | None = None,
    root: str = "model",
) -> tuple[nn.Module, Walker, int]:
    """A walk with a store; the wrapped model, the walker, and how many blocks ran."""
    model = prepare(build_model("llama"), config)
    ran: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: ran.append(1))
    walker = gptq_walker(model, rounder, cache=StatisticsCache(store, {"model": root}))
    walker.run(as_batches(tokens), schedule)
    return model, walker, len(ran)


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_the_second_walk_runs_nothing_and_decides_the_same(schedule: str, tmp_path: Path, token_batches: list[Tensor]):
    store = Store(tmp_path, 1e9)
    plain = prepare(build_model("llama"), CONFIG)
    gptq_walker(plain).run(as_batches(token_batches), schedule)
    cold, first, ran = walk(store, token_batches, schedule)
    assert ran == 2 * len(token_batches) and (first.options.cache.hits, first.options.cache.misses > 20) == (0, True)
    warm, second, ran = walk(store, token_batches, schedule)
    assert ran == 0 and (second.options.cache.hits, second.options.cache.misses) == (first.options.cache.misses, 0)
    assert 0 < second.options.cache.seconds < 60
    assert decided(warm) == decided(cold) == decided(plain)
    assert second.result.reports == first.result.reports
    assert set(second.result.statistics) == set(first.result.statistics)
    assert all(torch.equal(value, first.result.statistics[name]) for name, value in second.result.statistics.items())


def test_parallel_statistics_serve_other_recipes(tmp_path: Path, token_batches: list[Tensor]):
    store = Store(tmp_path, 1e9)
    walk(store, token_batches, "parallel")
    other = PTQConfig(weight="int3:channel:sym", activation=None, overrides={"model.embed_tokens": None})
    for rounder in (SeqMSE(), GPTQ(GPTQOptions(act_order=False, damp=0.1))):
        _, walker, ran = walk(store, token_batches, "parallel", other, rounder)
        assert ran == 0 and walker.options.cache.misses == 0


def test_sequential_statistics_serve_what_was_decided_alike_before(tmp_path: Path, token_batches: list[Tensor]):
    store = Store(tmp_path, 1e9)
    walk(store, token_batches, "sequential")
    later = {"model.embed_tokens": None, "model.layers.1.mlp.down_proj": {"weight": "int3:g16:sym"}}
    config = PTQConfig(weight="int4:g16:sym", activations="uint8:tensor:asym", overrides=later)
    changed, walker, _ = walk(store, token_batches, "sequential", config)
    plain = prepare(build_model("llama"), config)
    gptq_walker(plain).run(as_batches(token_batches), "sequential")
    assert decided(changed) == decided(plain)
    cache = walker.options.cache
    assert all(where.startswith("model.layers.0.") for where in cache.read) and cache.hits > 10


def test_another_model_shares_nothing(tmp_path: Path, token_batches: list[Tensor]):
    store = Store(tmp_path, 1e9)
    walk(store, token_batches, "parallel")
    _, walker, ran = walk(store, token_batches, "parallel", root="other")
    assert walker.options.cache.hits == 0 and ran


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_damage_costs_time_and_not_the_result(schedule: str, tmp_path: Path, token_batches: list[Tensor]):
    store = Store(tmp_path, 1e9)
    cold, *_ = walk(store, token_batches, schedule)
    for index, entry in enumerate(sorted(store.entries(), key=lambda entry: entry.path.name)):
        if index % 5 == 0:
            entry.path.write_bytes(entry.path.read_bytes()[:-1])
    again, walker, ran = walk(store, token_batches, schedule)
    assert decided(again) == decided(cold) and ran and walker.options.cache.misses
    _, walker, ran = walk(store, token_batches, schedule)
    assert (walker.options.cache.misses, ran) == (0, 0)


@pytest.fixture
def factorized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The columns of each Hessian that is factorized; factors are kept however small."""
    columns: list[int] = []
    monkeypatch.setattr(cache_module, "_LEAST", 1)
    monkeypatch.setattr(
        cache_module, "factorize", lambda hessian, *args: columns.append(len(hessian)) or factorize(hessian, *args)
    )
    return columns


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"precision": "float64"}, {"asymmetric": 1.0}])
def test_a_recipe_reads_the_factors_of_another(options, factorized, tmp_path: Path, token_batches: list[Tensor]):
    schedule = "sequential" if "asymmetric" in options else "parallel"
    config = PTQConfig(weight="int4:g16:sym", activation=None)
    other = config if schedule == "sequential" else PTQConfig(weight="int3:channel:sym", activation=None)
    alone, *_ = walk(Store(tmp_path / "alone", 1e9), token_batches, schedule, other, GPTQ(GPTQOptions(**options)))
    store = Store(tmp_path, 1e9)
    walk(store, token_batches, schedule, config, GPTQ(GPTQOptions(**options)))
    assert len(factorized) >= 8
    factorized.clear()
    found, *_ = walk(store, token_batches, schedule, other, GPTQ(GPTQOptions(**options)))
    assert not factorized and decided(found) == decided(alone)
    for changed in ({"damp": 0.1}, {"act_order": not options.get("act_order", True)}):
        walk(store, token_batches, schedule, config, GPTQ(GPTQOptions(**{**options, **changed})))
        assert factorized, "it depends on that"
        factorized.clear()
    kept = [entry for entry in store.entries() if entry.facts()["kind"].startswith("factor of hessian")]
    for entry in kept:
        entry.path.write_bytes(entry.path.read_bytes()[:-1])
    again, *_ = walk(store, token_batches, schedule, other, GPTQ(GPTQOptions(**options)))
    assert factorized and decided(again) == decided(alone)


def test_the_factor_that_is_read_is_the_one_that_was_kept(factorized, tmp_path: Path) -> None:
    cache, rows = StatisticsCache(Store(tmp_path, 1e9), {"model": "m"}), torch.randn(7, 12)  # so it takes more damping
    cache.begin([[CachedPoint("w", None, {"hessian": "hessian"})]], True)
    first, second = InputStatistics(), InputStatistics()
    for statistics in (first, second):
        statistics.add(rows)
        statistics.factorize = partial(cache.factorize, "w")
    made, read = first.factor(1e-9, True, "w"), second.factor(1e-9, True, "w")
    assert factorized == [12] and read is not made and read.damp == made.damp > 1e-9
    assert torch.equal(read.upper, made.upper) and read.upper.dtype == made.upper.dtype
    assert torch.equal(read.order, made.order) and torch.equal(read.dead, made.dead)


def test_small_factors_are_not_kept(tmp_path: Path, token_batches: list[Tensor]):
    store = Store(tmp_path, 1e9)
    walk(store, token_batches, "parallel")
    assert not any(entry.facts()["kind"].startswith("factor") for entry in store.entries())


def test_shared_inputs_are_stored_once(tmp_path: Path, token_batches: list[Tensor]):
    store = Store(tmp_path, 1e9)
    walk(store, token_batches, "sequential", PTQConfig(weight="int4:g16:sym", activation=None))
    facts = {facts["point"]: facts for entry in store.entries() if (facts := entry.facts())}
    for twin in ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"):
        assert "same_as" in facts[f"model.layers.0.{twin}.weight"]
    assert "same_as" not in facts["model.layers.0.self_attn.q_proj.weight"]


def test_more_than_the_limit_is_not_kept(tmp_path: Path, token_batches: list[Tensor]):
    _, walker, _ = walk(Store(tmp_path, 5000), token_batches, "sequential")
    assert "more than 5e-06 GB (runtime.cache_gb)" in walker.options.cache.problem
    assert sum(1 for _ in Store(tmp_path, 1e9).entries()) < walker.options.cache.misses


def test_a_folder_that_cannot_be_written_does_not_stop_a_walk(tmp_path: Path, token_batches: list[Tensor]):
    (tmp_path / "file").write_text("")
    _, walker, ran = walk(Store(tmp_path / "file", 1e9), token_batches, "sequential")
    assert ran and "cannot keep statistics" in walker.options.cache.problem
