"""What every registered corrector promises, those of other packages among them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.contracts.algorithm import DEVICES, variants
from wrapq.algorithms.base import Correction, Corrector
from wrapq.errors import CalibrationError
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.input import InputStatistics, UnusableStatisticsError

EVERY = variants(Corrector)
SHAPES = [(12, 20), (20, 12), (1, 16), (16, 1)]
WHERE = "layers.3.up_proj.weight"

pytestmark = pytest.mark.parametrize("name", EVERY)


def problem(shape: tuple[int, int] = SHAPES[0], device: torch.device = DEVICES[0]) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [N, K], what rounding to three bits takes from it, and inputs [M, K], all off zero and correlated."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(shape, generator=generator)
    x = torch.randn(200, 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    x += 0.3 * torch.randn(200, shape[1], generator=generator) + 3
    rounded = observe_tensor(weight, QuantSpec.parse("int3:tensor:sym"), WHERE).fake_quantize(weight)
    return weight.to(device), (weight - rounded).to(device), x.to(device)


def gathered(corrector: Corrector, x: Tensor) -> InputStatistics:
    """What it asks for of the rows `x`, which are the float model's as well, and nothing else."""
    statistics = InputStatistics(corrector.needs)
    statistics.add(x, x)
    return statistics


def correct(corrector: Corrector, weight: Tensor, error: Tensor, x: Tensor) -> Correction:
    return corrector.correct(weight, error, WHERE, gathered(corrector, x))


def tensors(correction: Correction) -> dict[str, Tensor]:
    return {name: t for name in ("bias", "a", "b") if (t := getattr(correction, name)) is not None}


def added(correction: Correction, x: Tensor) -> Tensor:
    """What it adds to the output for inputs [M, K]."""
    bias, a, b = correction[:3]
    return (0 if bias is None else bias) + (0 if a is None or b is None else x @ a.t() @ b.t())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_gives_what_it_says_and_no_more(name: str, shape: tuple[int, int], device: torch.device) -> None:
    corrector = EVERY[name]
    assert (corrector.phase, corrector.handles) == ("correct", "weight") and corrector.adds in ("bias", "low_rank")
    correction = correct(corrector, *problem(shape, device))
    given = tensors(correction)
    assert set(given) == ({"bias"} if corrector.adds == "bias" else {"a", "b"})
    rank = len(given["a"]) if "a" in given else 0
    assert {n: tuple(t.shape) for n, t in given.items()}.items() <= {
        "bias": (shape[0],), "a": (rank, shape[1]), "b": (shape[0], rank)
    }.items()  # fmt: skip
    for tensor in given.values():
        assert tensor.device.type == device.type and tensor.is_floating_point() and not tensor.requires_grad
        assert bool(torch.isfinite(tensor).all())
    assert all(isinstance(value, float) for value in correction.report.values())
    assert corrector.added_elements(shape) == sum(tensor.numel() for tensor in given.values())


def test_the_same_is_the_same_to_the_bit_whatever_the_random_state(name: str) -> None:
    torch.manual_seed(1)
    first = tensors(correct(EVERY[name], *problem()))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = tensors(correct(EVERY[name], *problem()))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_changes_nothing_that_it_is_given(name: str) -> None:
    weight, error, x = problem()
    statistics = gathered(EVERY[name], x)
    held = [weight, error, *statistics.sums.values()]
    before = [tensor.clone() for tensor in held]
    EVERY[name].correct(weight, error, WHERE, statistics)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(held, before, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_output_is_off_less_than_without_it(name: str, shape: tuple[int, int]) -> None:
    weight, error, x = problem(shape)
    lacking = x @ error.t()
    left = lacking - added(correct(EVERY[name], weight, error, x), x)
    assert float(left.norm()) < 0.9 * float(lacking.norm())


def test_adds_nothing_where_nothing_is_lacking(name: str) -> None:
    weight, error, x = problem()
    assert not bool(added(correct(EVERY[name], weight, torch.zeros_like(error), x), x).any())


def test_sums_of_several_batches_do_as_those_of_one(name: str) -> None:
    weight, error, x = problem()
    statistics = InputStatistics(EVERY[name].needs)
    for rows in x.split(64):
        statistics.add(rows, rows)
    expected = added(correct(EVERY[name], weight, error, x), x)
    got = added(EVERY[name].correct(weight, error, WHERE, statistics), x)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_weight_without_data_is_named(name: str) -> None:
    weight, error, x = problem()
    with pytest.raises(UnusableStatisticsError, match=WHERE):
        correct(EVERY[name], weight, error, x[:0])


def test_data_that_is_not_finite_is_named(name: str) -> None:
    weight, error, x = problem()
    x[3, 2] = torch.nan
    with pytest.raises(CalibrationError, match=WHERE):
        correct(EVERY[name], weight, error, x)


def test_what_it_makes_is_made_where_the_weight_is(name: str) -> None:
    weight, error, x = problem()
    statistics = gathered(EVERY[name], x)
    with torch.device("meta"):  # where anything lands that is not told its device, and no value can be had
        given = tensors(EVERY[name].correct(weight, error, WHERE, statistics))
    assert given and not any(tensor.is_meta for tensor in given.values())
