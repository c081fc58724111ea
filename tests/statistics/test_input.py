"""Statistics of a weight's input: exactly what is declared, the same however it is gathered, kept or shared."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.calibration.conftest import as_batches, gptq_walker
from tests.conftest import build_model
from wrapq import PTQConfig, prepare
from wrapq.algorithms.base import Rounded
from wrapq.algorithms.rtn import RTN
from wrapq.errors import CalibrationError
from wrapq.half_products import fast_half_products
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.cache import StatisticsCache
from wrapq.statistics.cholesky import inverse_of_triangle
from wrapq.statistics.input import (
    AGAINST_FLOAT,
    PARTS,
    InputStatistics,
    UnusableStatisticsError,
    keep_rows,
)
from wrapq.statistics.store import Store
from wrapq.statistics.transport import Rotated, Scaled, rotate_blocks_, transform_statistics

WEIGHTS = PTQConfig(weight="int4:g16:sym", activation=None, overrides={"model.embed_tokens": None, "*norm*": None})


class Keeping(RTN):
    """Rounds to nearest and keeps what it was given."""

    def __init__(self, *needs: str) -> None:
        super().__init__()
        self._needs, self.given = needs, {}

    @property
    def needs(self) -> tuple[str, ...]:
        return self._needs

    def round(self, weight: Tensor, spec: QuantSpec, where: str, statistics: InputStatistics | None = None) -> Rounded:
        self.given[where] = statistics
        return super().round(weight, spec, where)


def literal(x: Tensor) -> dict[str, Tensor]:
    """The definitions, in float64."""
    x = x.double()
    ends = {"absmax": x.abs().amax(0), "least": x.amin(0), "greatest": x.amax(0)}
    means = {"mean": x.mean(0), "mean_abs": x.abs().mean(0), "mean_square": x.square().mean(0)}
    return {"hessian": x.t() @ x, **ends, **means}


@pytest.mark.parametrize(
    "needs",
    [("absmax",), ("mean", "mean_abs", "mean_square"), ("hessian", "absmax", "least", "greatest", "mean", "float64")],
    ids=str,
)
def test_gathers_what_was_declared_and_nothing_else(needs: tuple[str, ...]):
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) - 1
    statistics = InputStatistics(needs)
    for part in (rows[:7], rows[7:7], rows[7:]):
        statistics.add(part)
    assert set(statistics.sums) == set(needs) - {"float64"} and statistics.rows == 50
    for name in statistics.sums:
        got = statistics.get(name, "w")
        assert got.dtype == (torch.float64 if "float64" in needs else torch.float32)
        torch.testing.assert_close(got.double(), literal(rows)[name], rtol=1e-5, atol=1e-6)


def test_no_rows_and_nan_are_refused_by_name():
    with pytest.raises(UnusableStatisticsError, match=r"^layer\.weight: no calibration token"):
        InputStatistics(("absmax",)).get("absmax", "layer.weight")
    statistics = InputStatistics(("mean",))
    statistics.add(torch.full((2, 3), float("inf")))
    with pytest.raises(CalibrationError, match=r"^layer\.weight: the data holds NaN or inf, so its mean is not finite"):
        statistics.get("mean", "layer.weight")


@pytest.mark.parametrize("more", [(), ("float64",)], ids=["float32", "float64"])
def test_groups_have_the_sums_of_so_many_weights(more: tuple[str, ...]):
    needs = (*PARTS, *more)
    rows, reference = torch.randn(2, 3, 50, 6, generator=torch.Generator().manual_seed(0)) - 1
    together, alone = InputStatistics(needs), [InputStatistics(needs) for _ in rows]
    for part in (slice(7), slice(7, 7), slice(7, None)):
        together.add(rows[:, part], reference[:, part])
        for statistics, its, floats in zip(alone, rows, reference, strict=True):
            statistics.add(its[part], floats[part])
    again = InputStatistics(needs)
    again.load(together.parts(), torch.device("cpu"))
    for statistics in (together, again):
        assert (statistics.groups, statistics.rows) == (3, 50)
        for index, expected in enumerate(alone):
            group = statistics.group(index)
            assert (group.groups, group.rows, group.sums.keys()) == (1, 50, expected.sums.keys())
            for name in PARTS:
                torch.testing.assert_close(group.get(name, "w"), expected.get(name, "w"), rtol=1e-5, atol=1e-5)
    assert torch.equal(together.get("mean", "w"), torch.stack([together.group(i).get("mean", "w") for i in range(3)]))


def test_groups_that_no_row_reached_have_sums_to_be_put_together():
    statistics = InputStatistics(("hessian", "mean"))
    statistics.start(6, torch.device("cpu"), groups=3)
    assert {name: tuple(held.shape) for name, held in statistics.sums.items()} == {"hessian": (3, 6, 6), "mean": (3, 6)}
    with pytest.raises(UnusableStatisticsError, match=r"^layer\.weight: no calibration token"):
        statistics.group(1).get("mean", "layer.weight")


def test_every_part_has_a_definition():
    assert set(PARTS) == set(literal(torch.ones(1, 1))) | AGAINST_FLOAT | {"sample"}


@pytest.mark.parametrize("schedule", ["parallel", "sequential"])
def test_a_walk_gives_each_weight_the_statistics_of_its_input(schedule: str, token_batches: list[Tensor]):
    """Of the first block's q, k and v the input is the same in the float and in the quantized model."""
    model, original = prepare(build_model("llama"), WEIGHTS), build_model("llama")
    seen: list[Tensor] = []
    layer = original.model.layers[0].self_attn
    layer.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten(0, 1)))
    for ids in token_batches:
        original(input_ids=ids, use_cache=False)
    rounder = Keeping("absmax", "least", "greatest", "mean", "mean_abs", "mean_square", "hessian")
    gptq_walker(model, rounder).run(as_batches(token_batches), schedule)
    given = [rounder.given[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert given[0] is given[1] is given[2]
    for name, value in literal(torch.cat(seen)).items():
        torch.testing.assert_close(given[0].get(name, "w").double(), value, rtol=1e-4, atol=1e-5)


def test_algorithms_with_other_needs_read_the_parts_they_share(tmp_path: Path, token_batches: list[Tensor]):
    def walk(*needs: str) -> tuple[StatisticsCache, Keeping]:
        rounder = Keeping(*needs)
        cache = StatisticsCache(Store(tmp_path, 1e9), {"model": "llama"})
        walker = gptq_walker(prepare(build_model("llama"), WEIGHTS), rounder, cache=cache)
        walker.run(as_batches(token_batches), "parallel")
        return cache, rounder

    _, gathered = walk("absmax", "hessian")
    cache, read = walk("hessian")
    assert cache.misses == 0 and cache.hits == len(read.given)
    where = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(read.given[where].sums["hessian"], gathered.given[where].sums["hessian"])
    assert set(read.given[where].sums) == {"hessian"}
    cache, _ = walk("mean", "hessian")
    assert cache.hits == 0


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 500, 1408])
def test_a_hessian_summed_by_halves_is_whole(columns: int) -> None:
    statistics, rows = InputStatistics(), torch.randn(3, 40, columns)
    for part in rows:
        statistics.add(part)
    expected = rows.flatten(0, 1).double().t() @ rows.flatten(0, 1).double()
    torch.testing.assert_close(statistics.sums["hessian"].double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(statistics.sums["hessian"][-1, :-1], statistics.sums["hessian"][:-1, -1])
    statistics.add(rows[0])  # after somebody has read it
    expected += rows[0].double().t() @ rows[0].double()
    torch.testing.assert_close(statistics.sums["hessian"].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 300, 777])
def test_the_inverse_of_a_triangle(size: int) -> None:
    lower = torch.randn(size, size, dtype=torch.double).tril_() / size + torch.eye(size)
    expected = torch.linalg.inv(lower)
    torch.testing.assert_close(inverse_of_triangle(lower), expected, rtol=1e-10, atol=1e-12)
    assert not inverse_of_triangle(lower).triu(1).any()


@pytest.mark.parametrize("needs", [("hessian",), ("hessian", "absmax")])
def test_inputs_in_bfloat16_are_summed_in_float32_by_the_matrix_units_of_a_cpu_too(needs):
    rows = (torch.randn(3000, 300, generator=torch.Generator().manual_seed(0)) + 0.5).bfloat16()
    before, found = torch.backends.mkldnn.matmul.fp32_precision, []
    for using in (nullcontext(), fast_half_products()):
        statistics = InputStatistics(needs)
        with using:
            for part in rows.split(700):
                statistics.add(part)
        found.append(statistics.get("hessian", "w"))
    exact = rows.double().t() @ rows.double()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    for hessian in found:
        assert hessian.dtype == torch.float32
        assert (hessian - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inputs_of_sixteen_bits_are_summed_in_float32_on_a_gpu(dtype):
    torch.manual_seed(0)
    rows = (torch.randn(5000, 192) * torch.rand(192) + 0.5).to("cuda", dtype)
    statistics = InputStatistics(("hessian", "absmax"))
    for part in rows.split(700):
        statistics.add(part)
    exact = rows.double().t() @ rows.double()
    found = statistics.get("hessian", "w")
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()
    assert torch.equal(statistics.get("absmax", "w"), rows.float().abs().amax(0))


def test_a_sample_is_of_the_same_rows_whatever_the_order_and_the_parts() -> None:
    batches = [torch.randn(300, 6) for _ in range(5)]
    samples = []
    for order in (range(5), (3, 1, 4, 0, 2)):
        statistics = InputStatistics(("sample",))
        for index in order:
            statistics.add(batches[index], batch=index)
        samples.append(statistics.get("sample", "here"))
    parts = [InputStatistics(("sample",)) for _ in range(2)]
    for index, batch in enumerate(batches):
        parts[index % 2].add(batch, batch=index)
    together = keep_rows(torch.cat([part.sums["sample"] for part in parts]), 512)[:, :-1]
    assert samples[0].shape == (512, 6)
    assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], together)
    counts = [int((samples[0][:, None] == batch).all(-1).any(-1).sum()) for batch in batches]
    assert sum(counts) == 512 and min(counts) > 60  # rows of every batch, none twice


def test_a_sample_of_few_rows_is_all_of_them() -> None:
    statistics, x = InputStatistics(("sample", "least", "greatest")), torch.randn(7, 3)
    statistics.add(x[:4])
    statistics.add(x[4:], batch=1)
    found = statistics.get("sample", "here")
    assert torch.equal(found[found[:, 0].argsort()], x[x[:, 0].argsort()])
    assert torch.equal(statistics.get("least", "here"), x.amin(0))
    assert torch.equal(statistics.get("greatest", "here"), x.amax(0))


def test_samples_and_extremes_follow_a_change_of_the_input() -> None:
    x, factors = torch.randn(40, 8), torch.rand(8) + 0.5
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    blocks = torch.arange(8).reshape(2, 4)
    needs = ("sample", "least", "greatest")
    changed = [(x / factors, needs, Scaled(factors)), (x.clone(), needs[:1], Rotated(rotation, blocks))]
    rotate_blocks_(changed[1][0], -1, blocks, rotation)
    for expected, parts, change in changed:
        before, after = InputStatistics(parts), InputStatistics(parts)
        before.add(x)
        after.add(expected)
        moved = transform_statistics(before, [change], "here")
        for part in parts:
            torch.testing.assert_close(moved.get(part, "here"), after.get(part, "here"))
