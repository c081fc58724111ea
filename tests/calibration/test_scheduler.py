"""Forwards side by side: who waits, who goes first, that nothing is left behind, and the loop over the blocks."""

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from greenlet import greenlet
from torch import Tensor, nn

import wrapq
from wrapq.calibration.block_checkpoint import BlockCheckpoint
from wrapq.calibration.block_loader import BlockLoader
from wrapq.calibration.scheduler import run_blocks, run_concurrently, wait_for
from wrapq.observers.forward_context import forward_context, in_context


class Place:
    """A barrier that writes down when it opened."""

    def __init__(self, name: str, order: int, log: list[str]) -> None:
        self.name, self.order, self.log = name, (order,), log

    def open(self) -> None:
        self.log.append(self.name)


def running() -> list[greenlet]:
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is greenlet and o.parent is not None and o and not o.dead]


def run(forwards: Sequence[Callable[[], object]], done: Callable[[], bool] = lambda: False) -> None:
    with run_concurrently(forwards, done) as barriers:
        for _ in barriers:
            pass


def test_all_arrive_before_a_place_is_decided_and_go_on_after():
    log: list[str] = []
    places = [Place(name, order, log) for order, name in enumerate("AB")]

    def forward(index: int) -> None:
        for place in places:
            log.append(f"{index}>{place.name}")
            wait_for(place)
        log.append(f"{index} ends")

    run([lambda i=i: forward(i) for i in range(3)])
    assert log == ["0>A", "1>A", "2>A", "A", "0>B", "1>B", "2>B", "B", "0 ends", "1 ends", "2 ends"]


def test_where_forwards_part_the_least_order_goes_first():
    log: list[str] = []
    early, late = Place("early", 1, log), Place("late", 2, log)
    run([lambda: wait_for(late), lambda: (wait_for(early), wait_for(late))])
    assert log == ["early", "late"]


def test_stops_as_soon_as_nothing_is_left_to_decide():
    log: list[str] = []
    place = Place("A", 1, log)

    def forward() -> None:
        try:
            wait_for(place)
            log.append("never")
        finally:
            log.append("cleaned")

    run([forward, forward], lambda: bool(log))
    assert log == ["A", "cleaned", "cleaned"]
    assert not running()


@pytest.mark.parametrize("when", ["before", "after", "opening"])
def test_an_exception_ends_all_and_leaves_no_forward_alive(when: str):
    log: list[str] = []
    place = Place("A", 1, log)
    if when == "opening":
        place.open = lambda: 1 / 0

    def failing() -> None:
        if when == "before":
            raise ZeroDivisionError
        wait_for(place)
        raise ZeroDivisionError

    def innocent() -> None:
        try:
            wait_for(place)
            wait_for(place)
        finally:
            log.append("cleaned")

    with pytest.raises(ZeroDivisionError):
        run([innocent, failing, innocent])
    assert log.count("cleaned") == (1 if when == "before" else 2)
    assert not running()


def test_no_forwards_and_forwards_that_never_wait():
    run([])
    done = []
    run([lambda: done.append(1)])
    assert done == [1]
    run([lambda: done.append(2)], lambda: True)
    assert done == [1]


def test_one_inside_another():
    """A forward may itself run others: waiting goes to the innermost."""
    log: list[str] = []
    outer, inner = Place("outer", 1, log), Place("inner", 1, log)

    def forward() -> None:
        run([lambda: wait_for(inner)])
        wait_for(outer)

    run([forward, forward])
    assert log == ["inner", "inner", "outer"]


class Blocks(nn.Module):
    """Three blocks that add one each, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Identity() for _ in range(3)), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x + 1)
        return self.head(x)


class Logged(BlockLoader):
    """Writes down what it is asked for."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def load(self, block: int) -> None:
        self.log.append(f"load {block}")

    def release(self, block: int) -> None:
        self.log.append(f"release {block}")


def through(model: Blocks, batch: int, log: list[str]) -> None:
    with in_context(batch=batch):
        log.append(f"batch {batch} ends with {float(model(torch.zeros(1)))}")


def test_all_forwards_go_through_one_block_before_any_enters_the_next() -> None:
    model, log = Blocks(), []
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=index: log.append(f"{forward_context().batch} through {i}"))
    run_blocks(
        list(model.layers),
        [partial(through, model, batch, log) for batch in (0, 1)],
        begin=lambda block: log.append(f"begin {block}"),
        finish=lambda block, following: log.append(f"finish {block}, next {following}"),
        arrive=lambda block, batch, hidden: log.append(f"{batch} at {block} with {float(hidden)}"),
        loader=Logged(log),
    )
    assert log[:2] == ["0 at 0 with 1.0", "1 at 0 with 1.0"]
    for block, following in ((0, 1), (1, 2)):
        start = log.index(f"load {block}")
        assert log[start : start + 8] == [
            f"load {block}",
            f"begin {block}",
            f"0 through {block}",
            f"0 at {following} with {following + 1.0}",
            f"1 through {block}",
            f"1 at {following} with {following + 1.0}",
            f"finish {block}, next {following}",
            f"release {block}",
        ]
    assert log[-8:-2] == [
        "load 2",
        "begin 2",
        "0 through 2",
        "batch 0 ends with 3.0",
        "1 through 2",
        "batch 1 ends with 3.0",
    ]
    assert log[-2:] == ["finish 2, next None", "release 2"]
    assert not any(layer._forward_pre_hooks for layer in model.layers)


def test_blocks_before_a_checkpoint_do_not_run() -> None:
    model, log = Blocks(), []
    ran: list[int] = []
    for index, layer in enumerate(model.layers):
        layer.forward = lambda x, i=index: ran.append(i) or x
    checkpoint = BlockCheckpoint(2, lambda batch: torch.full((1,), 10.0 + batch), as_tuple=False)
    forwards = [partial(through, model, batch, log) for batch in (0, 1)]
    run_blocks(list(model.layers), forwards, loader=Logged(log), checkpoint=checkpoint)
    assert ran == [2, 2]
    assert log == ["load 2", "batch 0 ends with 11.0", "batch 1 ends with 12.0", "release 2"]
    through(model, 0, log)
    assert ran == [2, 2, 0, 1, 2] and log[-1] == "batch 0 ends with 3.0"


def test_nothing_else_knows_greenlets() -> None:
    package = Path(wrapq.__file__).parent
    knowing = {path.relative_to(package) for path in package.rglob("*.py") if "import greenlet" in path.read_text()}
    knowing |= {path.relative_to(package) for path in package.rglob("*.py") if "from greenlet" in path.read_text()}
    assert knowing == {Path("calibration/scheduler.py")}
