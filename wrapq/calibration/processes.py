"""Several processes that share the calibration data, as `torchrun` starts them.

Each walks its share of the batches through its own copy of the model. Before a point is finalized its statistics are
reduced over all of them, so that every process finalizes it alike. The result is that of one process up to the order in
which floats are summed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from wrapq.observers.base import Observer, make_observer
from wrapq.statistics.input import PARTS, InputStatistics, keep_rows

T = TypeVar("T")


@dataclass
class Processes:
    """The `count` processes of one run, of which this one is number `rank`, and `local_rank` among those of its
    machine, which is the GPU it takes; rank 0 writes files and records."""

    count: int = 1
    rank: int = 0
    local_rank: int = 0
    _device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def from_environment(cls) -> Processes:
        """From WORLD_SIZE, RANK and LOCAL_RANK, which `torchrun` and its like set; one process without them."""
        defaults = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
        count, rank, local = (int(os.environ.get(name, default)) for name, default in defaults.items())
        return cls(count, rank, local)

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """While this holds, the processes can talk: by NCCL on GPUs, else by Gloo."""
        if self.count == 1:
            yield
            return
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        self._device = device
        try:
            yield
        finally:
            dist.destroy_process_group()

    def share(self, items: Sequence[T]) -> list[tuple[int, T]]:
        """Those of `items` that are this process's to work on, each with its index."""
        return [(index, item) for index, item in enumerate(items) if index % self.count == self.rank]

    def text_of_first(self, text: str) -> str:
        """The `text` that process 0 has."""
        return self._exchange(text)[0]

    def least(self, value: int) -> int:
        """The least `value` of all processes."""
        if self.count == 1:
            return value
        least = torch.tensor(value, device=self._device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def reduce(self, statistics: InputStatistics, columns: int, groups: int = 1) -> None:
        """Let `statistics`, of a weight with K `columns` in so many `groups`, hold what all processes saw."""
        if self.count == 1 or self.least(int(statistics.complete)):
            return
        # weights that share an input share its statistics, which are complete with the first of them; but a process in
        # which no token came by has some for each, and is told
        knowing = self.least(self.rank if statistics.complete else self.count)
        statistics.start(columns, self._device, groups)
        rows = torch.tensor(statistics.rows, device=self._device)
        for value, operation in [(rows, "sum")] + [(v, PARTS[name].reduce) for name, v in statistics.sums.items()]:
            if knowing < self.count:
                dist.broadcast(value, knowing)
            elif operation == "rows":
                every = [each.to(value.device) for each in self._exchange(value.cpu())]
                value.copy_(keep_rows(torch.cat(every, -2), value.shape[-2]))
            else:
                dist.all_reduce(value, getattr(dist.ReduceOp, operation.upper()))
        statistics.rows = int(rows)

    def merge_observer(self, observer: Observer) -> None:
        """Let `observer` hold what it saw in all processes, merged in the order of their ranks."""
        if self.count == 1:
            return
        mine = {name: tensor.cpu() for name, tensor in observer.state_dict().items()}
        every = [{n: t.to(self._device) for n, t in state.items()} for state in self._exchange(mine)]
        states = [state for state in every if state]
        if states:
            observer.load_state_dict(states[0])
        for state in states[1:]:
            other = make_observer(observer.target)
            other.load_state_dict(state)
            observer.merge(other)

    def _exchange(self, mine: T) -> list[T]:
        """What every process has, in the order of their ranks."""
        every: list[Any] = [mine] * self.count
        if self.count > 1:
            dist.all_gather_object(every, mine)
        return every
