"""Offload: the activations of waiting forwards go to disk when they exceed a limit.

A walk suspends every batch in the middle of its forward, and what the suspended forward holds, residuals, products, the
input of the weight it waits for, is in local variables of whatever model it is. A dispatch mode sees every tensor that
a forward makes; those still alive when it suspends are what it holds. They are written to a file and emptied, and
filled again, the same objects, before the forward goes on.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wrapq.errors import OutputError
from wrapq.large_pages import give_back, resident
from wrapq.observers.forward_context import forward_context
from wrapq.wrappers.model import iter_quantizers
from wrapq.wrappers.quantizer import WeightQuantizer

_LEAST_BYTES = 1 << 14  # what is smaller stays in memory
_UNUSED = 1 << 28  # bytes that may be freed without being given back to the system: rounding soon takes them again
_Held = tuple[torch.UntypedStorage, list[Tensor]]  # a storage, and the tensors that view it


class _Away(NamedTuple):
    """A tensor that was emptied, and how it views a piece of the file, which holds its storage."""

    tensor: Tensor
    piece: int
    offset: int
    shape: Sequence[int]
    stride: Sequence[int]


class Offload(TorchDispatchMode):
    """Keeps what all suspended forwards together hold in memory within a `limit` of bytes; the rest goes to files in
    `folder`. The weights of the wrapped `model` that they run, dequantized or not, belong to none of them."""

    def __init__(self, folder: Path, limit: float, model: nn.Module) -> None:
        super().__init__()
        self.folder, self.limit = folder, limit
        self.written = 0  # bytes that went to disk
        # to search the model for them takes longer than all else at a suspension
        self._modules = list(model.modules())
        self._weights = [point for point in iter_quantizers(model) if isinstance(point, WeightQuantizer)]
        self._made: dict[int, list[weakref.ref[Tensor]]] = {}
        self._in_memory: dict[int, int] = {}
        self._most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (batch := forward_context().batch) is not None:
            made = self._made.setdefault(batch, [])
            made += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result

    @contextmanager
    def running(self) -> Iterator[None]:
        """While forwards run: only then is every tensor that they make seen."""
        with self:
            if self._most:  # some forward has waited before
                self._give_back()
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While a forward that runs computes nothing for its batch: the mode costs each call of torch several
        microseconds, and rounding a weight makes thousands."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()
            self._give_back()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While the batch that calls this is suspended: what it holds is on disk if it would exceed the limit. Raises
        `OutputError` when the disk is full."""
        batch = cast(int, forward_context().batch)
        going, self._in_memory[batch] = self._divide(self._held(batch))
        if not going:
            self._give_back()
            yield
            del self._in_memory[batch]
            return
        path = self.folder / f"batch-{batch}.bin"
        try:
            away = self._write(path, going)
        except OSError as error:
            remedy = "free some, or keep more in memory with runtime.offload_gb=..."
            raise OutputError(f"cannot put activations aside in {self.folder}: {error.strerror}; {remedy}") from error
        pieces = [(storage.nbytes(), storage.device) for storage, _ in going]
        del going
        self._give_back()
        try:
            yield
            del self._in_memory[batch]
            _fill(path, pieces, away)  # not for a forward that is given up meanwhile
        finally:
            path.unlink()

    def _give_back(self) -> None:
        """Let glibc return what it keeps of freed memory between tensors that live on, which is up to as much again as
        those; but not what the waiting forwards have needed before and will again: fresh memory is slow."""
        if (resident() or 0) > self._most + _UNUSED:
            give_back()
            self._most = max(self._most, resident() or 0)

    def _divide(self, held: list[_Held]) -> tuple[list[_Held], int]:
        """What goes to disk, the oldest first, and how many bytes stay in memory."""
        room = self.limit - sum(self._in_memory.values())
        stays, going = sum(storage.nbytes() for storage, _ in held), []
        for storage, tensors in held:
            if stays <= room:
                break
            going.append((storage, tensors))
            stays -= storage.nbytes()
        return going, stays

    def _held(self, batch: int) -> list[_Held]:
        """The storages that the batch alone keeps alive, in the order in which they were made."""
        made = [tensor for ref in self._made.get(batch, []) if (tensor := ref()) is not None]
        alive = {id(tensor): tensor for tensor in made if tensor.layout == torch.strided}
        self._made[batch] = [weakref.ref(tensor) for tensor in alive.values()]
        # what the model holds on behalf of all batches at the moment: weights come and go
        weights = (tensor for module in self._modules for tensor in module._parameters.values())
        held = chain(weights, (point.dequantized for point in self._weights))
        shared = {tensor.untyped_storage().data_ptr() for tensor in held if tensor is not None}
        found: dict[int, _Held] = {}
        for tensor in alive.values():
            storage = tensor.untyped_storage()
            if storage.nbytes() >= _LEAST_BYTES and storage.data_ptr() not in shared:
                found.setdefault(storage.data_ptr(), (storage, []))[1].append(tensor)
        return list(found.values())

    def _write(self, path: Path, held: list[_Held]) -> list[_Away]:
        away = []
        with path.open("wb") as file:
            for storage, _ in held:
                whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                self.written += file.write(whole.cpu().numpy().data)
        for piece, (_, tensors) in enumerate(held):
            for tensor in tensors:
                away.append(_Away(tensor, piece, int(tensor.storage_offset()), tensor.shape, tensor.stride()))
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return away


def _fill(path: Path, pieces: list[tuple[int, torch.device]], away: list[_Away]) -> None:
    with path.open("rb") as file:
        storages = [
            torch.from_numpy(np.fromfile(file, np.uint8, size)).to(device).untyped_storage() for size, device in pieces
        ]
    for tensor, piece, *view in away:
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storages[piece], *view)
