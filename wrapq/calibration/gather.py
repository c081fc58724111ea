"""Statistics of a float model's activations, block by block, for transforms that change it in the same walk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wrapq.calibration.blocks import find_blocks
from wrapq.calibration.border import made_for_all
from wrapq.calibration.forward import Batch, Run
from wrapq.calibration.lockstep import Stop, run_lockstep, wait_at
from wrapq.calibration.offload import Offload
from wrapq.calibration.processes import Processes
from wrapq.calibration.slots import find_leaf
from wrapq.calibration.statistics import InputStatistics
from wrapq.calibration.stops import Gate
from wrapq.wrappers.quantizer import STREAM, real_tokens

Gathered = Mapping[str, InputStatistics]


class Gatherer:
    """Runs the calibration batches once through a float model and hands out each block's statistics when it is done.

    The batches wait for each other before each block, so that only one block's statistics are held, and what is handed
    them may change the block they are of, as long as its function stays.

    Args:
        model: a float model, not wrapped.
        needs: for each module, by name, the statistics of its input that are wanted; modules with one input share them.
        done: called with the statistics of each block, or of what lies before or after all, once all batches left it.

    Attributes:
        offload: what keeps waiting forwards within a limit of memory; None keeps them in memory.
        processes: those that share the data.
    """

    def __init__(self, model: nn.Module, needs: Mapping[str, frozenset[str]], done: Callable[[Gathered], None]) -> None:
        self.model, self.needs, self.done = model, needs, done
        self.offload: Offload | None = None
        self.processes = Processes()
        self._blocks = find_blocks(model)
        self._groups: dict[int, list[str]] = {}
        self._gathered: dict[str, InputStatistics] = {}
        seen_blocks = False
        for name, _ in model.named_modules():
            index = self._blocks.index(name)
            seen_blocks |= index is not None
            if name in needs:
                outside = self._blocks.count if seen_blocks else -1
                self._groups.setdefault(outside if index is None else index, []).append(name)

    @torch.no_grad()
    def run(self, batches: Sequence[Batch]) -> None:
        """Run all batches, once."""
        gates = [Gate((i,), i, self._wait, lambda *_: None, self._open) for i in range(self._blocks.count)]
        layers = [self.model.get_submodule(name) for name in self._blocks.names()]
        hooks = [
            layer.register_forward_pre_hook(gate.enter, with_kwargs=True)
            for gate, layer in zip(gates, layers, strict=True)
        ]
        hooks += [
            self.model.get_submodule(name).register_forward_pre_hook(partial(self._meet, name)) for name in self.needs
        ]
        mine = [
            FloatRun(self.model, batch, index)
            for index, batch in enumerate(batches)
            if index % self.processes.count == self.processes.rank
        ]
        every: list[Stop] = list(gates)
        try:
            paused = self.offload.paused if self.offload else nullcontext
            with self.offload or nullcontext():
                run_lockstep(mine, lambda: False, partial(self._choose, every), paused)
        finally:
            for hook in hooks:
                hook.remove()
        for index in sorted(self._groups):
            self._finish(index)

    def _choose(self, every: Sequence[Stop], stops: Iterable[Stop]) -> Stop | None:
        """The next gate, the same in all processes."""
        agreed = self.processes.least(min((every.index(stop) for stop in stops), default=len(every)))
        return every[agreed] if agreed < len(every) else None

    def _wait(self, stop: Stop) -> None:
        with self.offload.aside() if self.offload else nullcontext():
            wait_at(stop)

    def _open(self, index: int) -> None:
        for before in sorted(group for group in self._groups if group < index):
            self._finish(before)

    def _finish(self, index: int) -> None:
        """Hand out what was gathered of a group, summed over all processes."""
        gathered = {
            name: self._gathered.pop(name, InputStatistics(self.needs[name])) for name in self._groups.pop(index)
        }
        for name, statistic in gathered.items():
            self.processes.reduce(statistic, _width(self.model.get_submodule(name)))
            statistic.complete = True
        self.done(gathered)

    def _meet(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        stream = STREAM.get()
        if not isinstance(stream, FloatRun) or not args:
            return
        needs = self.needs[name]
        known = stream.last[1] if stream.last is not None and stream.last[0] is args[0] else None
        if known is not None and known.needs != needs:
            known = None
        statistic = self._gathered.setdefault(name, known or InputStatistics(needs))
        if statistic is not known:
            with made_for_all():
                statistic.add(_rows(module, args[0].detach()))
        stream.last = args[0], statistic


class FloatRun(Run):
    """A batch's run through a float model."""

    quantizes = False

    def __init__(self, model: nn.Module, batch: Batch, index: int) -> None:
        super().__init__(model, batch, index)
        self.last: tuple[Tensor, InputStatistics] | None = None


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """`x` as a matrix of its channels [M, K], of real tokens only."""
    leaf = find_leaf(module)
    if leaf is not None and leaf.channel_axis == 1:
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    return real_tokens(x, 1).reshape(-1, x.shape[-1])


def _width(module: nn.Module) -> int:
    leaf = find_leaf(module)
    if leaf is None or leaf.reads is None:
        return 0
    return leaf.reads.width(module.get_parameter(leaf.reads.parameter))
