"""The walk of the calibration data through a wrapped model, deciding every open point on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from wrapq.calibration.algorithm import RangeSetter, Rounding
from wrapq.calibration.blocks import Blocks, find_blocks
from wrapq.calibration.blockwise import BlockStop, check_blockwise, visit_model
from wrapq.calibration.border import Border, made_for_all, skipping
from wrapq.calibration.decider import Decider, release
from wrapq.calibration.forward import Batch, FloatTwin, Forward
from wrapq.calibration.lockstep import Stop, first, run_lockstep, wait_at
from wrapq.calibration.offload import Offload
from wrapq.calibration.residency import Residency
from wrapq.calibration.statistics import TWIN
from wrapq.calibration.stops import Gate, Once, OpenPoint
from wrapq.errors import CalibrationError
from wrapq.wrappers.quantizer import Quantizer, State, WeightQuantizer

Schedule = Literal["sequential", "parallel"]
__all__ = ["Batch", "Schedule", "Walker"]


class Walker(Decider):
    """Gathers what the points of a wrapped model need, and decides each of them when all of it is there.

    The batches go through the model side by side and wait for each other before each block. With the schedule
    `sequential` they also wait at each open point, which is decided with all that comes before it already quantized.
    With `parallel` they go through the float model, and the points of a block are decided once all have left it.

    Args:
        model: a wrapped model whose points observe.
        rounders: the algorithm that rounds each weight point, by the point's full name.
        setters: the algorithm that chooses each static activation point's range, likewise.
        advance: called after each block, for progress.

    Attributes:
        on_hidden: called with a block's index, a batch's, and the hidden states that enter the block.
        on_border: called between two blocks with the index of the next and whether blocks return a tuple, when
            everything before is decided.
        residency: brings in the blocks that are not in memory.
        offload: what keeps waiting forwards within a limit of memory; None keeps them in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        rounders: Mapping[str, Rounding],
        setters: Mapping[str, RangeSetter],
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(model, rounders, setters)
        self.advance = advance
        self.on_hidden: Callable[[int, int, Tensor], None] = lambda block, batch, hidden: None
        self.on_border: Callable[[int, bool], None] = lambda block, as_tuple: None
        self.residency = Residency()
        self.offload: Offload | None = None
        self.blocks: Blocks = find_blocks(model)
        self._schedule: Schedule = "sequential"
        self._as_tuple = False
        self._points: dict[Quantizer, OpenPoint] = {}
        self._gates: list[Gate] = []
        self._stops: list[BlockStop] = []
        self._order_points()

    def steps(self) -> tuple[int, str]:
        """How often `run` will call `advance`, and for what."""
        return (1, "model") if self.all_decided() else (max(self.blocks.count, 1), "block")

    @torch.no_grad()
    def run(self, batches: Sequence[Batch], schedule: Schedule, border: Border | None = None) -> None:
        """Decide all points; no batch is run when none of them looks at data, or the store has what it showed.

        With a `border` kept from another walk, this one takes up there: all points before it must be decided.

        Raises:
            CalibrationError: the data brought NaN or infinity to a point, or a sequential walk came again to one that
                its first visit had decided; the message names it.
            LifecycleError: no batch reached a point; the message names it.
        """
        self._schedule = schedule
        if self.blockwise:
            check_blockwise(schedule, self.processes.count)
        for quantizer in self._points:
            if quantizer.spec.dynamic:
                quantizer.freeze()
        if not self.all_decided():
            self.walking = True
            try:
                self._walk(batches, border)
            except _BlockAgainError:  # so no block is done before the last batch has run: the model is one block
                self._forget()
                self._walk(batches, None)
            finally:
                self.walking = False
        for index, group in self._groups():
            with self.residency.holding(index) if self._open_points(group) else nullcontext():
                for quantizer in group:
                    self.decide(quantizer)
            self.residency.release(index)

    def stop(self, point: Quantizer) -> Stop:
        """See `Walk.stop`."""
        return self._points[point]

    def decide_at_once(self, weight: WeightQuantizer) -> bool:
        """See `Walk.decide_at_once`; several processes have to agree first."""
        if self.processes.count > 1:
            return False
        with made_for_all(), self.offload.paused() if self.offload else nullcontext():
            self.decide(weight)
        return True

    def _order_points(self) -> None:
        seen_blocks = False
        for name, module in self.wrapped.items():
            index = self.blocks.index(name)
            seen_blocks |= index is not None
            outside = self.blocks.count if seen_blocks else -1
            for quantizer in module.point_quantizers().values():
                # where batches part ways, as in a mixture of experts, inner modules come before the outer one's sums
                order = (outside if index is None else index, 1, -name.count("."), len(self._points))
                self._points[quantizer] = OpenPoint(order, quantizer, self.decide)

    def _forget(self) -> None:
        self.blocks = Blocks()
        for table in (self.inputs, self.statistics, self.reports, self.fallbacks, self._tied):
            table.clear()
        for quantizer in self._points:
            quantizer.observe()
            if quantizer.spec.dynamic:
                quantizer.freeze()

    def _walk(self, batches: Sequence[Batch], border: Border | None) -> None:
        sequential = self._schedule == "sequential"
        if sequential:
            self.round_without_data([*self._of_group(-1), *self._of_group(self.blocks.count)])
        gates = [Gate((i, 0, 0), i, self._wait, self._enter, self._open) for i in range(self.blocks.count)]
        self._gates = gates
        self._look_up()
        if not self.all_decided():
            self._since = time.perf_counter()
            if self.blockwise and not self.blocks.count:
                visit_model(self.model, batches, self._decide_block)
            layers = [self.model.get_submodule(name) for name in self.blocks.names()]
            self._stops = [
                BlockStop((i, 0, 1), i, layer, len(batches), wait_at, self._decide_block)
                for i, layer in enumerate(layers)
                if any(self.is_blockwise(q) for q in self._of_group(i))
            ]
            hooks = self._hook(layers, gates, border.index if border else 0)
            paused = self.offload.paused if self.offload else nullcontext
            with skipping(layers, border), self.offload or nullcontext():
                try:
                    run_lockstep(self._forwards(batches), self.all_decided, self._choose, paused)
                finally:
                    for hook in hooks:
                        hook.remove()
        for _ in range(max(self.blocks.count, 1) - sum(gate.passed for gate in gates[1:])):
            self.advance()

    def _forwards(self, batches: Sequence[Batch]) -> list[Callable[[], None]]:
        sequential = self._schedule == "sequential"
        crossed = any(TWIN & self.needs(q) for q in self._points if isinstance(q, WeightQuantizer))
        crossed |= bool(self._stops)
        forwards: list[Callable[[], None]] = []
        for index, batch in enumerate(batches):
            if index % self.processes.count != self.processes.rank:
                continue
            twin = FloatTwin(self, batch, len(batches) + index, self._wait) if crossed and sequential else None
            forwards += [twin] if twin else []
            forwards.append(Forward(self, batch, index, self._wait if sequential else None, twin))
        return forwards

    def _hook(self, layers: Sequence[nn.Module], gates: Sequence[Gate], start: int) -> list[Any]:
        hooks: list[Any] = [layer.register_forward_hook(self._leave) for layer in layers[start:]]
        for gate, layer in zip(gates[start:], layers[start:], strict=True):
            hooks.append(layer.register_forward_pre_hook(gate.enter, with_kwargs=True))
        for stop in self._stops:
            hooks += stop.hook() if stop.index >= start else []
        visited: dict[str, Callable[[], NoReturn]] = {}
        if self.blocks.count > 1 and (self._schedule == "parallel" or self.residency.streamed):
            once = _streamed_again if self.residency.streamed else _block_again
            visited |= dict.fromkeys(self.blocks.names()[start:], once)
        if self._schedule == "sequential":
            static = (
                name
                for name, module in self.wrapped.items()
                if any(not quantizer.spec.dynamic for quantizer in module.activation_quantizers())
            )
            visited |= {name: partial(_point_again, name) for name in static}
        for name, again in visited.items():
            hooks.append(self.model.get_submodule(name).register_forward_pre_hook(Once(again).enter))
        return hooks

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._as_tuple = isinstance(output, tuple)

    def _wait(self, stop: Stop) -> None:
        held = any(stop.targets for stop in self._stops)  # which a problem is about to read
        with self.offload.aside() if self.offload and not held else nullcontext():
            wait_at(stop)

    def _choose(self, stops: Iterable[Stop]) -> Stop | None:
        """The next stop, the same in all processes, although in some of them nobody may wait there."""
        if self.processes.count == 1:
            return first(stops)
        every: list[Stop] = sorted([*self._points.values(), *self._gates], key=lambda stop: stop.order)
        mine = first(stops)
        agreed = self.processes.least(len(every) if mine is None else every.index(mine))
        return every[agreed] if agreed < len(every) else None

    def _enter(self, index: int, batch: int, hidden: Tensor) -> None:
        if index:
            self.on_hidden(index, batch, hidden)

    def _open(self, index: int) -> None:
        """Between two blocks: in a sequential walk the weights of the next that need no data are rounded, so that its
        activations are those of rounded weights; in a parallel one the points of the one before are decided.
        """
        if index:
            if self._schedule == "parallel":
                for quantizer in self._of_group(index - 1):
                    self.decide(quantizer)
            release(self._of_group(index - 1))
            self.on_border(index, self._as_tuple)
            self.residency.release(index - 1)
            self.advance()
        self.residency.bring(index)
        if self._schedule == "sequential":
            self.round_without_data(self._of_group(index))

    def _groups(self) -> Iterator[tuple[int, list[Quantizer]]]:
        """All points, in the groups that are decided one after the other."""
        for index, group in groupby(sorted(self._points, key=self._group), self._group):
            yield index, list(group)

    @staticmethod
    def _open_points(quantizers: Iterable[Quantizer]) -> list[Quantizer]:
        return [quantizer for quantizer in quantizers if quantizer.state is not State.QUANTIZED]

    def _group(self, quantizer: Quantizer) -> int:
        """The block that the point lies in; -1 for what comes before all blocks, their number for what comes after."""
        return self._points[quantizer].order[0]

    def _of_group(self, index: int) -> list[Quantizer]:
        return [quantizer for quantizer in self._points if self._group(quantizer) == index]

    def _decide_block(self, stop: BlockStop) -> None:
        self.round_blockwise(stop, self._of_group(stop.index))

    def _look_up(self) -> None:
        """Decide, without running anything, the points whose statistics the store has."""
        if (recall := self.recall) is None:
            return
        groups = list(self._groups())
        recall.begin([group for _, group in groups], self.algorithms(), self._schedule == "parallel")
        for index, group in groups:
            waiting = [q for q in self._open_points(group) if self.waits(q)]
            with self.residency.holding(index) if self._open_points(group) else nullcontext():
                if waiting and not self.load(waiting):
                    if self._schedule == "sequential":  # what comes after depends on it
                        break
                    continue
                self.round_without_data(group)
                for quantizer in waiting:
                    self.decide(quantizer)
                release(group)


class _BlockAgainError(Exception):
    """A block ran a second time in one forward of a parallel walk."""


def _block_again() -> NoReturn:
    raise _BlockAgainError


def _streamed_again() -> NoReturn:
    raise CalibrationError("a block runs more than once in a forward, so blocks cannot be streamed: runtime.load=whole")


def _point_again(name: str) -> NoReturn:
    raise CalibrationError(
        f"{name} runs more than once in a forward, and a sequential walk decides its ranges at the first: "
        f"use calibration.schedule=parallel, or leave its activations float"
    )
