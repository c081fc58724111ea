"""Cooperative scheduling: the batches of a pass run side by side and wait for each other inside the model.

Each batch runs the model's ordinary forward in a coroutine, a greenlet, which only this file knows. Where a forward
comes to a point that is not finalized yet, an activation without range or a weight that is not rounded, it waits at the
point's barrier. Once every forward that can get there waits, the barrier opens: the point is finalized from what all
batches brought, and they go on with it quantized. So every point sees activations in which all that lies before it is
quantized, at one forward a batch, without tracing and without code per model family.

`run_blocks` is the loop over the blocks of a model that calibration, the float pass and streamed evaluation share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from wrapq.calibration.block_checkpoint import BlockCheckpoint, skipped_blocks
from wrapq.calibration.block_loader import IN_MEMORY, BlockLoader
from wrapq.calibration.offload import Offload
from wrapq.calibration.processes import Processes
from wrapq.graph.blocks import input_hidden_states
from wrapq.observers.forward_context import forward_context


@dataclass(eq=False)
class Barrier:
    """A place inside the model at which forwards wait for each other.

    Attributes:
        order: of several barriers at which forwards wait, the one with the least order opens first.
        open: called when every forward that can reach this barrier waits at it; they go on when it returns.
        passed: whether it has opened.
    """

    order: tuple[int, ...]
    open: Callable[[], object] = lambda: None
    passed: bool = False


Choose = Callable[[Iterable[Barrier]], Barrier | None]


def first(barriers: Iterable[Barrier]) -> Barrier | None:
    """The barrier with the least order, or None where nobody waits."""
    return min(barriers, key=lambda barrier: barrier.order, default=None)


def run_blocks(
    layers: Sequence[nn.Module],
    forwards: Sequence[Callable[[], object]],
    *,
    begin: Callable[[int], None] = lambda block: None,
    finish: Callable[[int, int | None], None] = lambda block, following: None,
    arrive: Callable[[int, int, Tensor], None] = lambda block, batch, hidden: None,
    done: Callable[[], bool] = lambda: False,
    points: Iterable[Barrier] = (),
    loader: BlockLoader = IN_MEMORY,
    offload: Offload | None = None,
    pinned: Callable[[], bool] = lambda: False,
    processes: Processes | None = None,
    checkpoint: BlockCheckpoint | None = None,
    until: nn.Module | None = None,
) -> None:
    """Run `forwards` through the blocks of a model, all of them through one block before any enters the next.

    The forwards run up to the first block and wait there. Then, for each block:

    1. It is brought into memory, and `begin` prepares it, such as by rounding the weights that need no data.
    2. The forwards run through it, up to the next block or the end of the model. Where they wait at the barriers of
       open points on the way, these open one after the other, and the points are finalized.
    3. `finish` finalizes what is left of it and writes a checkpoint; it is given the block that comes next, if any.
    4. It is released from memory.

    Args:
        layers: the blocks; none for a model without, whose forwards run to the end.
        forwards: what runs, each with the number of its batch in the forward context; what they return is dropped.
        begin, finish: what is done with a block, by its index, before and after the forwards run through it.
        arrive: called with a block, a batch and the hidden states [B, T, K] that enter, before the batch waits there.
        done: whether nothing is left to finalize, so that the forwards need not run to their end.
        points: barriers at which forwards may wait inside the blocks; needed where several processes have to agree.
        loader: what brings blocks into memory.
        offload: what moves to disk what waiting forwards hold; all of it stays in memory without.
        pinned: whether what forwards hold that wait before a block has to stay in memory all the same.
        processes: those that share the data: all of them open the same barriers in the same order.
        checkpoint: where an earlier pass was put aside: the blocks before it do not run.
        until: a module after the blocks, such as the head of a language model, before which the forwards are given up:
            nobody looks at what it gives.
    """

    start = checkpoint.index if checkpoint else 0
    entries = {Barrier((index, 0, 0)): index for index in range(start, len(layers))}
    end = Barrier((len(layers) + 1, 0, 0))
    choose = _agreed(processes, [*points, *entries, end]) if processes and processes.count > 1 else first
    running = offload.running if offload else nullcontext

    def enter(barrier: Barrier, block: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a block, at whose entry forwards wait until all have left the block before."""
        batch = forward_context().batch
        if not barrier.passed and batch is not None:
            arrive(block, batch, input_hidden_states(args, kwargs))
            wait_for(barrier, None if pinned() else offload)

    with ExitStack() as stack:
        for barrier, index in entries.items():
            hook = partial(enter, barrier, index)
            stack.callback(layers[index].register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)
        if until is not None:
            stack.callback(until.register_forward_pre_hook(lambda *_: wait_for(end, offload), prepend=True).remove)
        stack.enter_context(skipped_blocks(layers, checkpoint))
        barriers = stack.enter_context(run_concurrently(forwards, done, choose, running))
        before_end = takewhile(lambda barrier: barrier is not end, barriers)
        reached = (entries[barrier] for barrier in before_end if barrier in entries)
        block = next(reached, None)
        while block is not None:
            loader.load(block)
            begin(block)
            following = next(reached, None)
            finish(block, following)
            loader.release(block)
            block = following


@contextmanager
def run_concurrently(
    forwards: Sequence[Callable[[], object]],
    done: Callable[[], bool] = lambda: False,
    choose: Choose = first,
    running: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Iterator[Iterator[Barrier]]:
    """Run `forwards` side by side, and drop what they return; yields an iterator over the barriers, each as soon as it
    is about to open.

    A barrier opens when the next one is asked for. The iterator ends with the forwards, or as soon as `done()` says
    that nothing is left to finalize; those that still wait are given up when the context is left. An exception in a
    forward, or in a barrier that opens, is raised where the next barrier is asked for.

    Args:
        done: asked before the forwards run on.
        choose: which of the barriers at which somebody waits opens next; None ends all.
        running: entered while forwards run.
    """
    parent = getcurrent()
    coroutines = [greenlet(forward, parent) for forward in forwards]
    waiting: dict[greenlet, Barrier] = {}

    def barriers() -> Iterator[Barrier]:
        ready = coroutines
        while not done():
            with running():
                for coroutine in ready:
                    barrier = coroutine.switch()
                    waiting.pop(coroutine, None)
                    if not coroutine.dead:
                        waiting[coroutine] = barrier
            if (chosen := choose(waiting.values())) is None:
                return
            yield chosen
            chosen.open()
            chosen.passed = True
            ready = [coroutine for coroutine, barrier in waiting.items() if barrier is chosen]

    try:
        yield barriers()
    finally:
        for coroutine in coroutines:
            if not coroutine.dead:
                coroutine.throw(GreenletExit)


def wait_for(barrier: Barrier, offload: Offload | None = None) -> None:
    """Suspend the forward that calls this, which `run_concurrently` runs, until `barrier` opens; `offload` moves what
    it holds to disk meanwhile."""
    with offload.aside() if offload else nullcontext():
        getcurrent().parent.switch(barrier)


def _agreed(processes: Processes, barriers: Sequence[Barrier]) -> Choose:
    """Chooses the next of `barriers`, the same in all processes, although in some of them nobody may wait there."""
    every = sorted(barriers, key=lambda barrier: barrier.order)

    def choose(waiting: Iterable[Barrier]) -> Barrier | None:
        mine = first(waiting)
        index = processes.least(len(every) if mine is None else every.index(mine))
        return every[index] if index < len(every) else None

    return choose


def single_use(error: Exception) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A forward pre-hook of a module that may run only once in a forward, since what it shows is used before it could
    run again; raises `error` when it does."""
    batches: set[int] = set()

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        batch = forward_context().batch
        if batch is None:  # the block is run by itself, and nothing is gathered
            return
        if batch in batches:
            raise error
        batches.add(batch)

    return enter
