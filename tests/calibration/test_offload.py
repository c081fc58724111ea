"""Waiting forwards on disk: the same bits, the limit held, no file left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.calibration.conftest import as_batches, decided, gptq_walker
from tests.calibration.test_walker import Mixture, expert_batches
from tests.conftest import KINDS, build_model
from wrapq import PTQConfig, prepare
from wrapq.calibration import offload
from wrapq.calibration.offload import Offload
from wrapq.calibration.walker import Walker
from wrapq.errors import OutputError

WEIGHTS = PTQConfig(weight="int4:channel:sym", activation=None)
BOTH = PTQConfig(weight="int4:channel:sym", activations="uint5:tensor:asym")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_LEAST_BYTES", 1)


def offloading(model: nn.Module, folder: Path, limit: float = 0) -> Walker:
    return gptq_walker(model, offload=Offload(folder, limit, model))


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("config", [WEIGHTS, BOTH], ids=["weights", "both"])
def test_the_same_bits(family: str, config: PTQConfig, tmp_path: Path, token_batches: list[Tensor]):
    batches = as_batches(token_batches)
    if family == "bert":
        batches = [type(b)({"input_ids": b.inputs["input_ids"]}) for b in batches]
    plain, aside = prepare(build_model(family), config), prepare(build_model(family), config)
    gptq_walker(plain).run(batches, "sequential")
    walker = offloading(aside, tmp_path)
    walker.run(batches, "sequential")
    assert walker.options.offload.written > 0 and not list(tmp_path.iterdir())
    assert decided(aside) == decided(plain)


def test_the_limit_decides_how_much_is_written(tmp_path: Path, token_batches: list[Tensor]):
    written = []
    for limit in (0, 1e5, 1e9):
        walker = offloading(prepare(build_model("llama"), WEIGHTS), tmp_path, limit)
        walker.run(as_batches(token_batches), "sequential")
        written.append(walker.options.offload.written)
    assert written[0] > written[1] > written[2] == 0


class Watched(Offload):
    """Notes what waiting forwards hold in memory."""

    most = 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        with super().aside():
            self.most = max(self.most, sum(self._in_memory.values()))
            yield


def test_no_more_is_written_than_exceeds_the_limit(tmp_path: Path, token_batches: list[Tensor]):
    def watched(limit: float) -> Watched:
        model = prepare(build_model("llama"), WEIGHTS)
        offload = Watched(tmp_path, limit, model)
        gptq_walker(model, offload=offload).run(as_batches(token_batches), "sequential")
        return offload

    most = watched(1e9).most
    tight = watched(most - 1)
    of_a_batch = most / len(token_batches)
    assert tight.most < most and 0 < tight.written < of_a_batch


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_a_mixture_of_experts(schedule: str, tmp_path: Path):
    batches = expert_batches((0,), (0, 1), (2,))
    torch.manual_seed(0)
    plain = prepare(Mixture(), BOTH)
    torch.manual_seed(0)
    aside = prepare(Mixture(), BOTH)
    gptq_walker(plain).run(batches, schedule)
    offloading(aside, tmp_path).run(batches, schedule)
    assert decided(aside) == decided(plain)


def test_a_full_disk_is_one_clear_error(tmp_path: Path, token_batches: list[Tensor]):
    walker = offloading(prepare(build_model("llama"), WEIGHTS), tmp_path / "missing")
    with pytest.raises(OutputError, match=r"cannot put activations aside .*: No such file .*runtime\.offload_gb"):
        walker.run(as_batches(token_batches), "sequential")
