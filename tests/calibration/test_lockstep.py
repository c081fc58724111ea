"""Forwards side by side: who waits, who goes first, and that nothing is left behind."""

import gc

import pytest
from greenlet import greenlet

from wrapq.calibration.lockstep import run_lockstep, wait_at


class Place:
    """A stop that writes down when it was decided and who was there."""

    def __init__(self, name: str, order: int, log: list[str]) -> None:
        self.name, self.order, self.log = name, (order,), log

    def decide(self) -> None:
        self.log.append(self.name)


def running() -> list[greenlet]:
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is greenlet and o.parent is not None and o and not o.dead]


def never() -> bool:
    return False


def test_all_arrive_before_a_place_is_decided_and_go_on_after():
    log: list[str] = []
    places = [Place(name, order, log) for order, name in enumerate("AB")]

    def forward(index: int) -> None:
        for place in places:
            log.append(f"{index}>{place.name}")
            wait_at(place)
        log.append(f"{index} ends")

    run_lockstep([lambda i=i: forward(i) for i in range(3)], never)
    assert log == ["0>A", "1>A", "2>A", "A", "0>B", "1>B", "2>B", "B", "0 ends", "1 ends", "2 ends"]


def test_where_forwards_part_the_least_order_goes_first():
    log: list[str] = []
    early, late = Place("early", 1, log), Place("late", 2, log)
    run_lockstep([lambda: wait_at(late), lambda: (wait_at(early), wait_at(late))], never)
    assert log == ["early", "late"]


def test_stops_as_soon_as_nothing_is_left_to_decide():
    log: list[str] = []
    place = Place("A", 1, log)

    def forward() -> None:
        try:
            wait_at(place)
            log.append("never")
        finally:
            log.append("cleaned")

    run_lockstep([forward, forward], lambda: bool(log))
    assert log == ["A", "cleaned", "cleaned"]
    assert not running()


@pytest.mark.parametrize("when", ["before", "after", "deciding"])
def test_an_exception_ends_all_and_leaves_no_forward_alive(when: str):
    log: list[str] = []
    place = Place("A", 1, log)
    if when == "deciding":
        place.decide = lambda: 1 / 0

    def failing() -> None:
        if when == "before":
            raise ZeroDivisionError
        wait_at(place)
        raise ZeroDivisionError

    def innocent() -> None:
        try:
            wait_at(place)
            wait_at(place)
        finally:
            log.append("cleaned")

    with pytest.raises(ZeroDivisionError):
        run_lockstep([innocent, failing, innocent], never)
    assert log.count("cleaned") == (1 if when == "before" else 2)
    assert not running()


def test_no_forwards_and_forwards_that_never_wait():
    run_lockstep([], never)
    done = []
    run_lockstep([lambda: done.append(1)], never)
    assert done == [1]
    run_lockstep([lambda: done.append(2)], lambda: True)
    assert done == [1]


def test_one_inside_another():
    """A forward may itself run a lockstep: waiting goes to the innermost."""
    log: list[str] = []
    outer, inner = Place("outer", 1, log), Place("inner", 1, log)

    def forward() -> None:
        run_lockstep([lambda: wait_at(inner)], never)
        wait_at(outer)

    run_lockstep([forward, forward], never)
    assert log == ["inner", "inner", "outer"]
