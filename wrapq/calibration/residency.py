"""Which blocks of a model are in memory: all of them, or only the one that is at work.

A model larger than memory has the parameters of its blocks on the meta device. Whoever works on a block, a walk, an
evaluation, the writing of the result, brings it in, and releases it when every batch has left it. What lies outside
the blocks, such as the embedding and the head, stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wrapq.calibration.blocks import Blocks, find_blocks
from wrapq.calibration.border import BATCH
from wrapq.calibration.lockstep import Stop, run_lockstep, wait_at
from wrapq.calibration.offload import Offload
from wrapq.calibration.stops import Gate
from wrapq.errors import ModelError
from wrapq.wrappers.base import QuantModuleBase
from wrapq.wrappers.model import iter_quantizers
from wrapq.wrappers.quantizer import Quantizer, State, WeightQuantizer


class Residency:
    """Every block is always in memory."""

    streamed = False

    def bring(self, block: int) -> None:
        """See that the block is in memory."""

    def release(self, block: int) -> None:
        """Nobody needs the block for now."""

    @contextmanager
    def holding(self, block: int) -> Iterator[None]:
        """While this holds the block is in memory; what is outside all blocks, of any other index, always is."""
        self.bring(block)
        yield
        self.release(block)


class Shelf(Protocol):
    """Where the decided points of a block stay while the block is not in memory."""

    def put(self, points: Iterable[Quantizer]) -> None:
        """Write down those of `points` that were not written yet."""

    def get(self, points: Iterable[Quantizer]) -> None:
        """Give those of `points` that were written their tensors back."""


class FloatBlocks(Residency):
    """The blocks of a wrapped float model, brought in from its checkpoint one at a time.

    Args:
        model: a wrapped model; the parameters of its blocks are on the meta device.
        weights: the model's parameters by name.
        device: where the model runs.
        shelf: keeps the points that were decided.

    Raises:
        ModelError: the model has no blocks, or some of them share a parameter.
    """

    streamed = True

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor], device: torch.device, shelf: Shelf) -> None:
        self.weights, self.device, self.shelf = weights, device, shelf
        self.blocks = streamable(model)
        self.points: dict[int, list[Quantizer]] = {i: [] for i in range(self.blocks.count)}
        for quantizer in iter_quantizers(model):
            if (block := self.blocks.index(quantizer.where)) is not None:
                self.points[block].append(quantizer)
        self._places: dict[int, dict[str, list[_Place]]] = {i: {} for i in range(self.blocks.count)}
        for block, name, place in _places(model, self.blocks):
            self._places[block].setdefault(name, []).append(place)
        self._here: set[int] = set()

    def bring(self, block: int) -> None:
        """Read the block's parameters, and what was decided of its points."""
        if block not in self._places or block in self._here:
            return
        self._here.add(block)
        for name, places in self._places[block].items():
            meta = places[0].parameter
            tensor = self.weights[name].to(self.device, meta.dtype)
            parameter = nn.Parameter(tensor, requires_grad=False)
            for place in places:
                place.table[place.key] = parameter
        self.shelf.get(self.points[block])

    def release(self, block: int) -> None:
        """Forget the block's parameters, and the tensors of its points, which the shelf keeps."""
        if block not in self._places:
            return
        self._here.discard(block)
        decided = [point for point in self.points[block] if point.state is State.QUANTIZED and not point.spec.dynamic]
        self.shelf.put(decided)
        for point in decided:
            point.scale = point.zero_point = point.permutation = point.global_scale = None
            if isinstance(point, WeightQuantizer):
                point.integers = None
                point.release()
        for places in self._places[block].values():
            for place in places:
                place.table[place.key] = place.parameter


class _Place:
    """A place at which a module holds a parameter, and the parameter without data that stands there meanwhile."""

    def __init__(self, table: dict[str, Any], key: str) -> None:
        self.table, self.key, self.parameter = table, key, table[key]


def _places(model: nn.Module, blocks: Blocks) -> Iterator[tuple[int, str, _Place]]:
    """Every place in a block: the block, the parameter's name, and the place. A wrapped module and the one it stands
    for hold the same."""
    for name, module in model.named_modules():
        if (block := blocks.index(name)) is None:
            continue
        for holder in (module, module.original) if isinstance(module, QuantModuleBase) else (module,):
            for key, parameter in holder._parameters.items():
                if parameter is not None:
                    yield block, f"{name}.{key}", _Place(holder._parameters, key)


def streamable(model: nn.Module) -> Blocks:
    """The blocks of `model`; raises `ModelError` where they cannot be brought in one at a time."""
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


def run_blockwise(
    model: nn.Module,
    residency: Residency,
    forwards: Sequence[Callable[[], None]],
    offload: Offload | None = None,
    advance: Callable[[], None] = lambda: None,
    resumed: Callable[[int, int], None] = lambda forward, block: None,
) -> None:
    """Run `forwards` of `model` side by side, block after block, so that each block is brought in once for all.

    Args:
        model: the model that the forwards run.
        residency: brings its blocks in.
        forwards: what runs; they end in their order.
        offload: keeps what waiting forwards hold within a limit.
        advance: called after each block.
        resumed: called with the number of a forward that is about to run a block, and the block's.
    """

    def opened(block: int) -> None:
        if block:
            residency.release(block - 1)
            advance()
        residency.bring(block)

    def enter(gate: Gate, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        gate.enter(layer, args, kwargs)
        resumed(BATCH.get() or 0, gate.index)

    def wait(stop: Stop) -> None:
        with offload.aside() if offload else nullcontext():
            wait_at(stop)

    names = find_blocks(model).names()
    gates = [Gate((i, 0, 0), i, wait, lambda *_: None, opened) for i in range(len(names))]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(enter, gate), with_kwargs=True)
        for name, gate in zip(names, gates, strict=True)
    ]
    numbered = [partial(copy_context().run, _as_batch, number, forward) for number, forward in enumerate(forwards)]
    try:
        with offload or nullcontext():
            run_lockstep(numbered, lambda: False)
    finally:
        for hook in hooks:
            hook.remove()
        residency.release(len(names) - 1)
    advance()


def _as_batch(number: int, forward: Callable[[], None]) -> None:
    BATCH.set(number)
    forward()
