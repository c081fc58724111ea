"""A walk that reads statistics instead of gathering them decides the same, and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.calibration.conftest import as_batches, decided, gptq_walker
from tests.conftest import build_model
from wrapq import PTQConfig, prepare
from wrapq.algorithms.gptq import GPTQ, GPTQOptions
from wrapq.algorithms.seqmse import SeqMSE
from wrapq.calibration.algorithm import Rounder
from wrapq.calibration.recall import Recall
from wrapq.calibration.store import Store
from wrapq.calibration.walker import Walker
from wrapq.quant.spec import QuantSpec

CONFIG = PTQConfig(weight="int4:g16:sym", activation="uint8:tensor:asym", overrides={"model.embed_tokens": None})


def walk(
    store: Store,
    tokens: list[Tensor],
    schedule: str,
    config: PTQConfig = CONFIG,
    rounder: Rounder | None = None,
    root: str = "model",
    others: Sequence[QuantSpec] = (),
) -> tuple[nn.Module, Walker, int]:
    """A walk with a store; the wrapped model, the walker, and how many blocks ran."""
    model = prepare(build_model("llama"), config)
    ran: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: ran.append(1))
    walker = gptq_walker(model, rounder)
    walker.recall = Recall(store, {"model": root})
    walker.others = dict.fromkeys(walker.rounders, others)
    walker.run(as_batches(tokens), schedule)
    return model, walker, len(ran)


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_the_second_walk_runs_nothing_and_decides_the_same(schedule: str, tmp_path: Path, token_batches: list[Tensor]):
    store = Store(tmp_path, 1e9)
    plain = prepare(build_model("llama"), CONFIG)
    gptq_walker(plain).run(as_batches(token_batches), schedule)
    cold, first, ran = walk(store, token_batches, schedule)
    assert ran == 2 * len(token_batches) and (first.recall.hits, first.recall.misses > 20) == (0, True)
    warm, second, ran = walk(store, token_batches, schedule)
    assert ran == 0 and (second.recall.hits, second.recall.misses) == (first.recall.misses, 0)
    assert 0 < second.recall.seconds < 60
    assert decided(warm) == decided(cold) == decided(plain)
    assert second.reports == first.reports
    assert set(second.statistics) == set(first.statistics)
    assert all(torch.equal(value, first.statistics[name]) for name, value in second.statistics.items())


def test_parallel_statistics_serve_other_recipes(tmp_path: Path, token_batches: list[Tensor]):
    store = Store(tmp_path, 1e9)
    walk(store, token_batches, "parallel")
    other = PTQConfig(weight="int3:channel:sym", activation=None, overrides={"model.embed_tokens": None})
    for rounder in (SeqMSE(), GPTQ(GPTQOptions(act_order=False, damp=0.1))):
        _, walker, ran = walk(store, token_batches, "parallel", other, rounder)
        assert ran == 0 and walker.recall.misses == 0


def test_sequential_statistics_serve_what_was_decided_alike_before(tmp_path: Path, token_batches: list[Tensor]):
    store = Store(tmp_path, 1e9)
    walk(store, token_batches, "sequential")
    later = {"model.embed_tokens": None, "model.layers.1.mlp.down_proj": {"weight": "int3:g16:sym"}}
    config = PTQConfig(weight="int4:g16:sym", activation="uint8:tensor:asym", overrides=later)
    changed, walker, _ = walk(store, token_batches, "sequential", config)
    plain = prepare(build_model("llama"), config)
    gptq_walker(plain).run(as_batches(token_batches), "sequential")
    assert decided(changed) == decided(plain)
    assert all(where.startswith("model.layers.0.") for where in walker.recall.recalled) and walker.recall.hits > 10


def test_another_model_shares_nothing(tmp_path: Path, token_batches: list[Tensor]):
    store = Store(tmp_path, 1e9)
    walk(store, token_batches, "parallel")
    _, walker, ran = walk(store, token_batches, "parallel", root="other")
    assert walker.recall.hits == 0 and ran


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_damage_costs_time_and_not_the_result(schedule: str, tmp_path: Path, token_batches: list[Tensor]):
    store = Store(tmp_path, 1e9)
    cold, *_ = walk(store, token_batches, schedule)
    for index, entry in enumerate(sorted(store.entries(), key=lambda entry: entry.path.name)):
        if index % 5 == 0:
            entry.path.write_bytes(entry.path.read_bytes()[:-1])
    again, walker, ran = walk(store, token_batches, schedule)
    assert decided(again) == decided(cold) and ran and walker.recall.misses
    _, walker, ran = walk(store, token_batches, schedule)
    assert (walker.recall.misses, ran) == (0, 0)


OTHER_SPECS = [QuantSpec.parse(text) for text in ("int3:channel:sym", "uint4:g16:asym", "fp4_e2m1:g16")]


@pytest.mark.parametrize("rounder", [GPTQ(), SeqMSE()], ids=["gptq", "seqmse"])
def test_a_walk_rounds_for_recipes_that_differ_in_the_spec(rounder, tmp_path: Path, token_batches: list[Tensor]):
    store = Store(tmp_path, 1e9)
    config = PTQConfig(weight="int4:g16:sym", activation=None, overrides={"model.embed_tokens": None})
    plain, *_ = walk(Store(tmp_path / "none", 1e9), token_batches, "parallel", config, rounder)
    first, walker, _ = walk(store, token_batches, "parallel", config, rounder, others=OTHER_SPECS)
    assert decided(first) == decided(plain) and walker.recall.rounded == 0
    for spec in OTHER_SPECS:
        other = replace(config, weight=spec)
        alone, lone, _ = walk(Store(tmp_path / str(spec), 1e9), token_batches, "parallel", other, rounder)
        found, walker, ran = walk(store, token_batches, "parallel", other, rounder)
        assert (ran, walker.recall.rounded) == (0, 15) and lone.recall.rounded == 0
        assert decided(found) == decided(alone) and walker.reports == lone.reports
        assert walker.recall.hits == 0, "nothing was left to look at"
    _, walker, _ = walk(store, token_batches, "parallel", other, GPTQ(GPTQOptions(damp=0.1)))
    assert walker.recall.rounded == 0
    _, walker, _ = walk(store, token_batches, "sequential", other, rounder)
    assert walker.recall.rounded == 0


def test_a_damaged_weight_is_rounded_again(tmp_path: Path, token_batches: list[Tensor]):
    store = Store(tmp_path, 1e9)
    other = PTQConfig(weight="int3:channel:sym", activation=None, overrides={"model.embed_tokens": None})
    walk(store, token_batches, "parallel", others=OTHER_SPECS)
    found, walker, _ = walk(store, token_batches, "parallel", other)
    assert walker.recall.rounded == 15
    kept = [entry for entry in store.entries() if entry.facts()["kind"] == "rounded int3:channel:sym"]
    for entry in kept[:3]:
        entry.path.write_bytes(entry.path.read_bytes()[:-1])
    again, walker, _ = walk(store, token_batches, "parallel", other)
    assert walker.recall.rounded < 15 and decided(again) == decided(found)


def test_shared_inputs_are_stored_once(tmp_path: Path, token_batches: list[Tensor]):
    store = Store(tmp_path, 1e9)
    walk(store, token_batches, "sequential", PTQConfig(weight="int4:g16:sym", activation=None))
    facts = {facts["point"]: facts for entry in store.entries() if (facts := entry.facts())}
    for twin in ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"):
        assert "same_as" in facts[f"model.layers.0.{twin}.weight"]
    assert "same_as" not in facts["model.layers.0.self_attn.q_proj.weight"]


def test_more_than_the_limit_is_not_kept(tmp_path: Path, token_batches: list[Tensor]):
    _, walker, _ = walk(Store(tmp_path, 5000), token_batches, "sequential")
    assert "more than 5e-06 GB (runtime.cache_gb)" in walker.recall.problem
    assert sum(1 for _ in Store(tmp_path, 1e9).entries()) < walker.recall.misses


def test_a_folder_that_cannot_be_written_does_not_stop_a_walk(tmp_path: Path, token_batches: list[Tensor]):
    (tmp_path / "file").write_text("")
    _, walker, ran = walk(Store(tmp_path / "file", 1e9), token_batches, "sequential")
    assert ran and "cannot keep statistics" in walker.recall.problem
