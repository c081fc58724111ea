"""Block loading: which blocks of a model are in memory, all of them or only the one that is at work.

A model larger than memory has the parameters of its blocks on the meta device. A block is loaded for as long as a walk,
an evaluation or the writing of the result works on it. What lies outside the blocks, such as the embedding and the
head, stays in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wrapq.errors import ModelError
from wrapq.graph.blocks import Blocks, find_blocks
from wrapq.wrappers.base import QuantModuleBase
from wrapq.wrappers.model import iter_quantizers
from wrapq.wrappers.quantizer import Quantizer, State, WeightQuantizer


class BlockLoader:
    """Every block is always in memory; subclasses load one at a time."""

    streamed = False

    def load(self, block: int) -> None:
        """Bring the block into memory, unless it is there."""

    def release(self, block: int) -> None:
        """Evict the block from memory."""

    def release_all(self) -> None:
        """Evict every block from memory."""

    @contextmanager
    def loaded(self, block: int) -> Iterator[None]:
        """While this holds the block is in memory; what is outside all blocks, of any other index, always is."""
        self.load(block)
        yield
        self.release(block)


IN_MEMORY = BlockLoader()


class PointStore(Protocol):
    """Keeps the parameters of the finalized points of blocks that are not in memory."""

    def put(self, points: Iterable[Quantizer]) -> None:
        """Store those of `points` that are not stored yet."""

    def get(self, points: Iterable[Quantizer]) -> None:
        """Give those of `points` that are stored their tensors back."""


class StreamedBlocks(BlockLoader):
    """The blocks of a wrapped float `model`, on the meta device, for which the parameters are read one block at a time
    from its checkpoint, the `weights` by name; `store` keeps the points that were finalized. Raises `ModelError` for a
    model that is not `streamable`."""

    streamed = True

    def __init__(
        self, model: nn.Module, weights: Mapping[str, Tensor], device: torch.device, store: PointStore
    ) -> None:
        self.weights, self.device, self.store = weights, device, store
        self.blocks = streamable(model)
        self.points: dict[int, list[Quantizer]] = {i: [] for i in range(self.blocks.count)}
        for quantizer in iter_quantizers(model):
            if (block := self.blocks.index(quantizer.where)) is not None:
                self.points[block].append(quantizer)
        self._places: dict[int, dict[str, _Place]] = {i: {} for i in range(self.blocks.count)}
        for name, module in model.named_modules():
            if (block := self.blocks.index(name)) is not None:
                holders = (module, module.original) if isinstance(module, QuantModuleBase) else (module,)
                for key, parameter in module._parameters.items():
                    if parameter is not None:
                        place = _Place(key, parameter, [holder._parameters for holder in holders])
                        self._places[block][f"{name}.{key}"] = place
        self._loaded: set[int] = set()

    def load(self, block: int) -> None:
        """Read the block's parameters, and those of its finalized points."""
        if block not in self._places or block in self._loaded:
            return
        self._loaded.add(block)
        for name, place in self._places[block].items():
            tensor = self.weights[name].to(self.device, place.parameter.dtype)
            place.put(nn.Parameter(tensor, requires_grad=False))
        self.store.get(self.points[block])

    def release(self, block: int) -> None:
        """Evict the block's parameters, and the tensors of its finalized points, which go to the store."""
        if block not in self._places:
            return
        self._loaded.discard(block)
        finalized = [point for point in self.points[block] if point.state is State.QUANTIZED and not point.spec.dynamic]
        self.store.put(finalized)
        for point in finalized:
            point.scale = point.zero_point = point.permutation = point.global_scale = None
            if isinstance(point, WeightQuantizer):
                point.integers = None
                point.release()
        for place in self._places[block].values():
            place.put(place.parameter)

    def release_all(self) -> None:
        for block in self._places:
            self.release(block)


class _Place(NamedTuple):
    """Where a module, and the one it stands for where it is wrapped, hold a parameter, which is without data."""

    key: str
    parameter: nn.Parameter
    tables: list[dict[str, nn.Parameter | None]]

    def put(self, parameter: nn.Parameter) -> None:
        for table in self.tables:
            table[self.key] = parameter


def streamable(model: nn.Module) -> Blocks:
    """The blocks of `model`; raises `ModelError` where they cannot be loaded one at a time."""
    blocks = find_blocks(model)
    if not blocks.count:
        raise ModelError(f"{type(model).__name__} has no repeated blocks to stream: use runtime.load=whole")
    owners: dict[int, int | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        block = blocks.index(name)
        for key, parameter in module._parameters.items():
            if parameter is not None and owners.setdefault(id(parameter), block) != block:
                what = f"{name}.{key} is shared by several blocks, or by a block and what is outside"
                raise ModelError(f"{what}, so blocks cannot be streamed: use runtime.load=whole")
    return blocks
