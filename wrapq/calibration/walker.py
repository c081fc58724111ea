"""The walk: calibration data goes through a wrapped model, block by block, and every open point is finalized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wrapq.calibration.assignments import Assignments
from wrapq.calibration.block_checkpoint import BlockCheckpoint
from wrapq.calibration.block_loader import IN_MEMORY, BlockLoader
from wrapq.calibration.block_reconstruction import ReconstructionBarrier, reconstruct_model
from wrapq.calibration.finalize import Finalizer, WalkResult, release
from wrapq.calibration.forwards import CalibrationForward, FloatReferenceForward
from wrapq.calibration.last_head import observed_in_parts
from wrapq.calibration.offload import Offload
from wrapq.calibration.processes import Processes
from wrapq.calibration.scheduler import Barrier, run_blocks, single_use, wait_for
from wrapq.calibration.token_weights import TokenWeights
from wrapq.errors import CalibrationError
from wrapq.graph.blocks import Batch, Blocks, find_blocks, output_head, replaced_forward
from wrapq.observers.forward_context import outside_batch
from wrapq.statistics.cache import StatisticsCache
from wrapq.statistics.input import AGAINST_FLOAT
from wrapq.wrappers.quantizer import Quantizer, State, WeightQuantizer

Schedule = Literal["sequential", "parallel"]
_NOT_QUANTIZED = "rounding block by block looks at quantized blocks: use calibration.schedule=sequential"
_STREAMED_AGAIN = "a block runs more than once in a forward, so blocks cannot be streamed: runtime.load=whole"
_POINT_AGAIN = (
    "{} runs more than once in a forward, and a sequential walk decides its ranges at the first: "
    "use calibration.schedule=parallel, or leave its activations float"
)


class CheckpointStore(Protocol):
    """Keeps the progress of a walk, so that another one can take it up."""

    def save_hidden(self, block: int, batch: int, hidden: Tensor) -> None:
        """Store the hidden states [B, T, K] with which a batch enters a block."""

    def save(self, block: int, as_tuple: bool, points: Iterable[Quantizer], result: WalkResult) -> None:
        """Store all that is finalized before `block`, whose hidden states have been stored."""

    def restore(self, points: Iterable[Quantizer], result: WalkResult, loader: BlockLoader) -> BlockCheckpoint | None:
        """Restore what was stored last into `points`, of a fresh model, and `result`; None where nothing was."""


@dataclass(frozen=True)
class WalkOptions:
    """The means of a walk, on which its result does not depend.

    Attributes:
        cache: statistics that earlier walks gathered; None gathers all.
        loader: loads the blocks that are not in memory.
        offload: keeps what waiting forwards hold within a limit of memory; None keeps all of it there.
        checkpoints: where the walk is put aside after each block and taken up again; None does neither.
        token_weights: of the weights whose algorithms need them.
    """

    processes: Processes = field(default_factory=Processes)
    cache: StatisticsCache | None = None
    loader: BlockLoader = IN_MEMORY
    offload: Offload | None = None
    checkpoints: CheckpointStore | None = None
    token_weights: TokenWeights = field(default_factory=dict)


class Walker:
    """Gathers what the points of a wrapped model need, and finalizes each of them once its statistics are complete.

    The batches go through the model side by side, block by block (`run_blocks`). With the schedule `sequential` they
    also wait at each open point, which is finalized with all that comes before it already quantized. With `parallel`
    they go through the float model, and the points of a block are finalized once all batches have left it.

    Attributes:
        model: a wrapped model whose points observe.
        options: how the walk is carried out. Where they have a checkpoint, the points before it are restored.
        checkpoint: where an earlier walk stopped and this one takes up; None for one that starts at the beginning.
        inputs: what was gathered for each open weight, by the point's full name.
        result: the record of the walk.
    """

    def __init__(self, model: nn.Module, assignments: Assignments, options: WalkOptions = WalkOptions()) -> None:
        self.model, self.assignments, self.options = model, assignments, options
        self.blocks: Blocks = find_blocks(model)
        self._finalizer = Finalizer(model, assignments, options.processes, options.cache)
        self.result, self.inputs = self._finalizer.result, self._finalizer.inputs
        self._barriers: dict[Quantizer, Barrier] = {}
        self._points: dict[int, list[Quantizer]] = {}  # by block, in order; -1 and their count: before and after all
        for name, block in self.blocks.positions(self._finalizer.wrapped):
            for point in self._finalizer.wrapped[name].point_quantizers().values():
                # where batches part ways, as in a mixture of experts, inner modules come before the outer one's sums
                order = (block, 1, -name.count("."), len(self._barriers))
                self._barriers[point] = Barrier(order, partial(self._finalizer.finalize, point))
                self._points.setdefault(block, []).append(point)
        self._reconstructions: list[ReconstructionBarrier] = []
        self._schedule: Schedule = "sequential"
        self._advance: Callable[[], None] = lambda: None
        self._finished = 0
        store = options.checkpoints
        self.checkpoint = store.restore(self.points(), self.result, options.loader) if store else None
        self._as_tuple = bool(self.checkpoint and self.checkpoint.as_tuple)

    def points(self) -> list[Quantizer]:
        """All points, in the model's order."""
        return list(self._barriers)

    def steps(self) -> tuple[int, str]:
        """How often `run` will call `advance`, and for what."""
        return (1, "model") if self._finalizer.all_finalized() else (max(self.blocks.count, 1), "block")

    @torch.no_grad()
    def run(self, batches: Sequence[Batch], schedule: Schedule, advance: Callable[[], None] = lambda: None) -> None:
        """Finalize all points; no batch is run when none of them needs data, or the cache has what it showed. After
        each block `advance` is called, for progress.

        Raises:
            CalibrationError: the data brought NaN or infinity to a point, or a sequential walk came again to one that
                its first visit had finalized; the message names it.
            LifecycleError: no batch reached a point; the message names it.
        """
        self._schedule, self._advance = schedule, advance
        if self._finalizer.open_by_block(self._barriers):
            if schedule == "parallel":
                raise CalibrationError(_NOT_QUANTIZED)
            if self.options.processes.count > 1:
                raise CalibrationError("rounding block by block needs all calibration data in one process")
        for point in self._barriers:
            if point.spec.dynamic:
                point.freeze()
        if not self._finalizer.all_finalized():
            self._finalizer.gathering = True
            try:
                self._walk(batches)
            except _BlockAgainError:  # so no block is done before the last batch has run: the model is one block
                self._finalizer.start_anew()
                self.blocks, self.checkpoint = Blocks(), None
                self._walk(batches)
            finally:
                self._finalizer.gathering = False
        for index, points in self._points.items():
            with self._loaded(index, points):
                for point in points:
                    self._finalizer.finalize(point)
        self._finalizer.forget_ties()

    def wait_at(self, point: Quantizer) -> None:
        """Suspend the forward that calls this until the point is finalized."""
        wait_for(self._barriers[point], self.options.offload)

    def finalize_at_once(self, weight: WeightQuantizer) -> bool:
        """Finalize a weight whose statistics are complete; several processes have to agree first."""
        if self.options.processes.count > 1:
            return False
        with outside_batch(), self.options.offload.paused() if self.options.offload else nullcontext():
            self._finalizer.finalize(weight)
        return True

    def _walk(self, batches: Sequence[Batch]) -> None:
        self._finished = self.checkpoint.index if self.checkpoint else 0
        self._round_without_data(-1, self.blocks.count)
        self._finalize_from_cache()
        if not self._finalizer.all_finalized():
            self._finalizer.restart_clock()
            self._run_batches(batches)
        for _ in range(max(self.blocks.count, 1) - self._finished):
            self._advance()

    def _run_batches(self, batches: Sequence[Batch]) -> None:
        layers = [self.model.get_submodule(name) for name in self.blocks.names()]
        if not layers and self._finalizer.open_by_block(self._barriers):
            reconstruct_model(self.model, batches, self._round_block)
        self._reconstructions = [
            ReconstructionBarrier(i, layer, len(batches), self._round_block)
            for i, layer in enumerate(layers)
            if self._finalizer.open_by_block(self._points.get(i, ()))
        ]
        waiting = [point for point in self._barriers if self._waits(point)]
        with ExitStack() as stack, replaced_forward(observed_in_parts(self.model, waiting)):
            for hook in self._hooks(layers):
                stack.callback(hook.remove)
            run_blocks(
                layers,
                self._forwards(batches),
                begin=self._round_without_data,
                finish=self._finish_block,
                arrive=self._arrive,
                done=self._finalizer.all_finalized,
                points=self._barriers.values(),
                loader=self.options.loader,
                offload=self.options.offload,
                pinned=lambda: any(barrier.targets for barrier in self._reconstructions),
                processes=self.options.processes,
                checkpoint=self.checkpoint,
                until=self._idle_head(),
            )

    def _idle_head(self) -> nn.Module | None:
        """The head of a language model, unless its points wait for data."""
        head = output_head(self.model)
        busy = {id(self.model.get_submodule(p.where.rpartition(".")[0])) for p in self._barriers if self._waits(p)}
        return None if head is None or busy & {id(module) for module in head.modules()} else head

    def _waits(self, point: Quantizer) -> bool:
        """Whether the point is finalized from data that is still to come."""
        return point.state is not State.QUANTIZED and self.assignments.needs_data(point)

    def _forwards(self, batches: Sequence[Batch]) -> list[Callable[[], None]]:
        sequential = self._schedule == "sequential"
        weights = [point for point in self._barriers if isinstance(point, WeightQuantizer)]
        differs = self._reconstructions or any(AGAINST_FLOAT & self.assignments.needs(point) for point in weights)
        forwards: list[Callable[[], None]] = []
        for index, batch in self.options.processes.share(batches):
            reference = FloatReferenceForward(self, batch, len(batches) + index) if sequential and differs else None
            forwards += [reference] if reference else []
            forwards.append(CalibrationForward(self, batch, index, sequential, reference))
        return forwards

    def _hooks(self, layers: Sequence[nn.Module]) -> Iterator[RemovableHandle]:
        """Hooks of the blocks that will run, and of modules that may run only once in a forward."""
        start = self.checkpoint.index if self.checkpoint else 0
        for layer in layers[start:]:
            yield layer.register_forward_hook(self._leave)
        for barrier in self._reconstructions:
            if barrier.index >= start:
                yield from barrier.hook()
        again: dict[str, Exception] = {}
        if self.blocks.count > 1 and self.options.loader.streamed:
            again = dict.fromkeys(self.blocks.names()[start:], CalibrationError(_STREAMED_AGAIN))
        elif self.blocks.count > 1 and self._schedule == "parallel":
            again = dict.fromkeys(self.blocks.names()[start:], _BlockAgainError())
        if self._schedule == "sequential":
            for name, module in self._finalizer.wrapped.items():
                if any(not point.spec.dynamic for point in module.activation_quantizers()):
                    again[name] = CalibrationError(_POINT_AGAIN.format(name))
        for name, error in again.items():
            yield self.model.get_submodule(name).register_forward_pre_hook(single_use(error))

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._as_tuple = isinstance(output, tuple)

    def _arrive(self, block: int, batch: int, hidden: Tensor) -> None:
        if block and self.options.checkpoints:
            self.options.checkpoints.save_hidden(block, batch, hidden)

    def _round_without_data(self, *blocks: int) -> None:
        """Round what needs no data, so that activations in a sequential walk are those of rounded weights."""
        if self._schedule == "sequential":
            self._finalizer.round_without_data(point for block in blocks for point in self._points.get(block, ()))

    def _finish_block(self, block: int, following: int | None) -> None:
        """Finalize the points of a block in a parallel walk, and write a checkpoint before the one that comes next."""
        points = self._points.get(block, ())
        if self._schedule == "parallel":
            for point in points:
                self._finalizer.finalize(point)
        release(points)
        if following is not None and self.options.checkpoints and not self.options.processes.rank:
            self.options.checkpoints.save(following, self._as_tuple, self.points(), self.result)
        self._finished += 1
        self._advance()

    def _round_block(self, barrier: ReconstructionBarrier) -> None:
        self._finalizer.round_block(barrier, self._points.get(barrier.index, ()))

    def _finalize_from_cache(self) -> None:
        """Finalize, without running anything, the points whose statistics the cache has."""
        if (cache := self.options.cache) is None:
            return
        cached = [[self.assignments.cached_point(point) for point in points] for points in self._points.values()]
        cache.begin(cached, self._schedule == "parallel")
        for index, points in self._points.items():
            waiting = [point for point in points if self._waits(point)]
            with self._loaded(index, points):
                if waiting and not self._finalizer.load(waiting):
                    if self._schedule == "sequential":  # what comes after depends on it
                        break
                    continue
                self._finalizer.round_without_data(points)
                for point in waiting:
                    self._finalizer.finalize(point)
                release(points)

    def _loaded(self, block: int, points: Iterable[Quantizer]) -> AbstractContextManager[None]:
        """While this holds the block is in memory, where any of its points is still open."""
        some_open = any(point.state is not State.QUANTIZED for point in points)
        return self.options.loader.loaded(block) if some_open else nullcontext()


class _BlockAgainError(Exception):
    """A block ran a second time in one forward of a parallel walk."""
