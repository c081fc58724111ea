"""Running many forwards side by side, so that all of them can stop at the same place inside the model.

Each batch runs the ordinary forward in a greenlet. Where the forward reaches something that is not decided yet, a point
whose range is still open or a weight not yet rounded, it suspends; when every batch has got as far as it can, the thing
is decided from what all of them brought there, and they go on with it in force. Every point thus sees activations in
which all that lies before it is already quantized, in one forward in all and without tracing or code per family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from greenlet import GreenletExit, getcurrent, greenlet


class Stop(Protocol):
    """A place at which forwards wait for each other."""

    order: tuple[int, ...]
    """Of several places at which forwards wait, the one with the least order is decided first."""

    def decide(self) -> None:
        """Called once no forward that can still reach the place is on its way; they go on when it returns."""


def first(stops: Iterable[Stop]) -> Stop | None:
    """The stop with the least order, or None where nobody waits."""
    return min(stops, key=lambda stop: stop.order, default=None)


def run_lockstep(
    forwards: Sequence[Callable[[], object]],
    done: Callable[[], bool],
    choose: Callable[[Iterable[Stop]], Stop | None] = first,
    deciding: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Run all `forwards` to their end, or until `done()` says that nothing is left to decide.

    What the forwards return is dropped. An exception in any of them, or in `decide`, ends all and is raised. `choose`
    says which of the stops at which somebody waits is decided next; None ends all. `deciding` is entered meanwhile.
    """
    parent = getcurrent()
    lets = [greenlet(_discard(forward), parent) for forward in forwards]
    waiting: dict[greenlet, Stop] = {}

    def advance(let: greenlet) -> None:
        stop = let.switch()
        waiting.pop(let, None)
        if not let.dead:
            waiting[let] = stop

    try:
        ready = lets
        while not done():
            for let in ready:
                advance(let)
            if (stop := choose(waiting.values())) is None:
                break
            with deciding():
                stop.decide()
            ready = [let for let, at in waiting.items() if at is stop]
    finally:
        for let in lets:
            if not let.dead:
                let.throw(GreenletExit)


def wait_at(stop: Stop) -> None:
    """Suspend the forward that calls this until `stop` has been decided. Only inside `run_lockstep`."""
    getcurrent().parent.switch(stop)


def _discard(forward: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        forward()

    return run
