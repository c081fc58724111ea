"""Several processes that share the calibration data, as `torchrun` starts them.

Each walks its part of the batches through its own copy of the model. Before a point is decided, what all of them
gathered for it is put together, so that every process decides the same from the same. The result is that of one process
up to the order in which floats are summed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from wrapq.calibration.statistics import PARTS, InputStatistics
from wrapq.observers.base import Observer, make_observer

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_VARIABLES = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))


@dataclass
class Processes:
    """The processes of one run.

    Attributes:
        count: how many there are.
        rank: which this one is; 0 writes files and records.
        local_rank: which this one is among those of its machine: the GPU it takes.
    """

    count: int = 1
    rank: int = 0
    local_rank: int = 0
    _device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def from_environment(cls) -> Processes:
        """What `torchrun` or its like says in WORLD_SIZE, RANK and LOCAL_RANK; one process without it."""
        count, rank, local = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
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

    def said_by_first(self, text: str) -> str:
        """The `text` that process 0 has."""
        if self.count == 1:
            return text
        first = self._exchange({"text": torch.tensor(list(text.encode()), dtype=torch.uint8)})[0]
        return bytes(first["text"].tolist()).decode()

    def least(self, value: int) -> int:
        """The least of what all processes say."""
        if self.count == 1:
            return value
        said = torch.tensor(value, device=self._device)
        dist.all_reduce(said, dist.ReduceOp.MIN)
        return int(said)

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
            else:
                dist.all_reduce(value, _OPERATIONS[operation])
        statistics.rows = int(rows)

    def merge_observer(self, observer: Observer) -> None:
        """Let `observer` hold what it saw in all processes, merged in the order of their ranks."""
        if self.count == 1:
            return
        states = [state for state in self._exchange(observer.state_dict()) if state]
        for index, state in enumerate(states):
            if index == 0:
                observer.load_state_dict(state)
                continue
            other = make_observer(observer.target)
            other.load_state_dict(state)
            observer.merge(other)

    def _exchange(self, mine: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """What every process has, in the order of their ranks."""
        data = torch.frombuffer(bytearray(save({k: v.cpu().contiguous() for k, v in mine.items()})), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(data)], device=self._device))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8, device=self._device)
        padded[: len(data)] = data.to(self._device)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        states = [load(part[: int(size)].cpu().numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]
        return [{name: tensor.to(self._device) for name, tensor in state.items()} for state in states]
