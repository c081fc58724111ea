"""The walk of the calibration data through a wrapped model, deciding every open point on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from wrapq.calibration.algorithm import RangeSetter, Rounded, Rounder
from wrapq.calibration.blocks import Blocks, find_blocks
from wrapq.calibration.border import BATCH, Border, entering, skipping
from wrapq.calibration.hessian import Hessian, UnusableHessianError
from wrapq.calibration.lockstep import run_lockstep, wait_at
from wrapq.errors import CalibrationError
from wrapq.observers.base import Observer, observe_tensor
from wrapq.wrappers.base import QuantModuleBase
from wrapq.wrappers.model import iter_wrapped
from wrapq.wrappers.quantizer import MEET, PADDING, SUSPEND, Quantizer, State, WeightQuantizer, real_tokens

SQNR_CEILING = 200.0  # dB; stands for "equal"
Schedule = Literal["sequential", "parallel"]


@dataclass(frozen=True)
class Batch:
    """One batch of calibration data: the keyword arguments of the forward, and the mask [B, T] of real tokens."""

    inputs: Mapping[str, Any]
    mask: Tensor | None = None


class Walker:
    """Decides the points of a wrapped model: weights by their rounder, static activation ranges by their setter.

    With the schedule `sequential` the batches go through the model side by side, and each point is decided with all
    that comes before it already quantized. With `parallel` they go one after the other through the float model.

    Args:
        model: a wrapped model whose points observe.
        rounders: the algorithm that rounds each weight point, by the point's full name.
        setters: the algorithm that chooses each static activation point's range, likewise.
        advance: called after each block (sequential) or batch (parallel), for progress.
        on_border: called in a sequential walk between two blocks, when everything before is decided.

    Attributes:
        statistics: after `run`, what the observer of each static activation point gathered, by the point's full name.
        reports: after `run`, for each weight its error and what its algorithm reports, by the point's full name.
        fallbacks: for each weight that was rounded to nearest because its Hessian could not be used, the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        rounders: Mapping[str, Rounder],
        setters: Mapping[str, RangeSetter],
        advance: Callable[[], None] = lambda: None,
        on_border: Callable[[Border], None] = lambda border: None,
    ) -> None:
        self.model, self.rounders, self.setters = model, rounders, setters
        self.advance, self.on_border = advance, on_border
        self.blocks: Blocks = find_blocks(model)
        self.wrapped = dict(iter_wrapped(model))
        self.statistics: dict[str, Tensor] = {}
        self.as_tuple = False
        self._tied: dict[tuple[int, str], Rounded] = {}
        self._stops: dict[Quantizer, _Open] = {}
        self._modules: dict[Quantizer, QuantModuleBase] = {}
        self.hessians: dict[str, Hessian] = {}
        self.reports: dict[str, dict[str, float]] = {}
        self.fallbacks: list[str] = []
        self._order_points()

    def steps(self, batches: Sequence[Batch], schedule: Schedule) -> tuple[int, str]:
        """How often `run` will call `advance`, and for what."""
        if self._all_decided():
            return 1, "model"
        return (max(self.blocks.count, 1), "block") if schedule == "sequential" else (len(batches), "batch")

    @torch.no_grad()
    def run(self, batches: Sequence[Batch], schedule: Schedule, border: Border | None = None) -> None:
        """Decide all points; no batch is run when none of them looks at data.

        With a `border` kept from another walk, a sequential one takes up there: all points before it must be decided.

        Raises:
            CalibrationError: the data brought NaN or infinity to a point, or a sequential walk came again to one that
                its first visit had decided; the message names it.
            LifecycleError: no batch reached a point; the message names it.
        """
        if schedule == "sequential":
            self._freeze_dynamic()
        if not self._all_decided():
            self._walk(batches, border) if schedule == "sequential" else self._observe(batches)
        self._freeze_dynamic()
        for quantizer in self._stops:
            self.decide(quantizer)

    def _freeze_dynamic(self) -> None:
        for quantizer in self._stops:
            if quantizer.spec.dynamic:
                quantizer.freeze()

    def _order_points(self) -> None:
        seen_blocks = False
        for name, module in self.wrapped.items():
            index = self.blocks.index(name)
            seen_blocks |= index is not None
            outside = self.blocks.count if seen_blocks else -1
            for quantizer in module.point_quantizers().values():
                # where batches part ways, as in a mixture of experts, inner modules come before the outer one's sums
                order = (outside if index is None else index, 1, -name.count("."), len(self._stops))
                self._stops[quantizer], self._modules[quantizer] = _Open(order, quantizer, self), module

    def points(self) -> Iterator[Quantizer]:
        """All points, in the model's order."""
        return iter(self._stops)

    def _walk(self, batches: Sequence[Batch], border: Border | None) -> None:
        for name, module in self.wrapped.items():
            if self.blocks.index(name) is None:
                self._round_without_data(module)
        gates = [_Gate((index, 0, 0), index, self) for index in range(self.blocks.count)]
        layers = [self.model.get_submodule(name) for name in self.blocks.names()]
        first = border.index if border else 0
        hooks = [
            hook
            for layer, gate in zip(layers[first:], gates[first:], strict=True)
            for hook in (
                layer.register_forward_pre_hook(gate.enter, with_kwargs=True),
                layer.register_forward_hook(gate.leave),
            )
        ]
        hooks += [
            module.register_forward_pre_hook(_Once(name).enter)
            for name, module in self.wrapped.items()
            if any(not quantizer.spec.dynamic for quantizer in module.activation_quantizers())
        ]
        forwards = [_Forward(self, batch, index, wait=True) for index, batch in enumerate(batches)]
        try:
            with skipping(layers, border):
                run_lockstep(forwards, self._all_decided)
        finally:
            for hook in hooks:
                hook.remove()
        for _ in range(max(self.blocks.count, 1) - sum(gate.decided for gate in gates[1:])):
            self.advance()

    def _observe(self, batches: Sequence[Batch]) -> None:
        for index, batch in enumerate(batches):
            _Forward(self, batch, index, wait=False)()
            self.advance()

    def meet(self, module: QuantModuleBase, raw: Tensor, x: Tensor, last: _Input) -> None:
        """Gather what the rounder of `module` needs of `x`, once for all weights that one tensor feeds in one form."""
        quantizer = module.weight_quantizer
        if quantizer is None or not self._needs_data(quantizer):
            return
        feeding = module.point_quantizers().get("input")
        form = str(feeding.spec) if feeding else ""
        known = last.hessian if last.raw is raw and last.form == form else None
        hessian = self.hessians.setdefault(quantizer.where, known or Hessian())
        if hessian is not known:
            hessian.add(module.input_matrix(real_tokens(x.detach(), 1)))
        last.raw, last.form, last.hessian = raw, form, hessian

    def enter_block(self, index: int, hidden: Mapping[int, Tensor]) -> None:
        """Round the weights of block `index`, which is about to run, so that its activations are those of rounded
        weights.

        Weights whose rounder needs data are rounded when the data gets to them.
        """
        for name, module in self.wrapped.items():
            block, quantizer = self.blocks.index(name), module.weight_quantizer
            if block == index:
                self._round_without_data(module)
            elif block == index - 1 and quantizer is not None:
                quantizer.release()
        if index:
            self.on_border(Border(index, [hidden[batch] for batch in sorted(hidden)], self.as_tuple))
            self.advance()

    def decide(self, quantizer: Quantizer) -> None:
        """Fix a point from what was gathered: round a weight, or choose an activation's range."""
        if quantizer.state is State.QUANTIZED:
            return
        if isinstance(quantizer, WeightQuantizer):
            self._round(quantizer)
            return
        quantizer.check()
        observer = cast(Observer, quantizer.observer)
        for key, tensor in observer.state_dict().items():
            self.statistics[f"{quantizer.where}.{key}"] = tensor.contiguous()
        quantizer.set_qparams(self.setters[quantizer.where].choose(observer, quantizer.where))

    def _round_without_data(self, module: QuantModuleBase) -> None:
        quantizer = module.weight_quantizer
        if quantizer is not None and quantizer.state is not State.QUANTIZED and not self._needs_data(quantizer):
            self._round(quantizer)

    def _round(self, quantizer: WeightQuantizer) -> None:
        module, where = self._modules[quantizer], quantizer.where
        key = (module.float_weight().data_ptr(), str(quantizer.spec))  # tied weights share their integers
        if key not in self._tied:
            weight, hessian = module.float_matrix(), self.hessians.pop(where, None)
            try:
                rounded = self.rounders[where].round(weight, quantizer.spec, where, hessian)
            except UnusableHessianError as error:
                self.fallbacks.append(str(error))
                qparams = observe_tensor(weight, quantizer.spec, where)
                rounded = Rounded(qparams.quantize(weight), qparams, {"fallback": 1.0})
            self._tied[key] = rounded
            self.reports[where] = rounding_report(weight, rounded, hessian)
        quantizer.set_rounded(self._tied[key].integers, self._tied[key].qparams)

    def _needs_data(self, quantizer: WeightQuantizer) -> bool:
        return "hessian" in self.rounders[quantizer.where].needs

    def suspend(self, quantizer: Quantizer) -> None:
        """Let the forward that calls this wait until `quantizer` is decided."""
        wait_at(self._stops[quantizer])

    def _all_decided(self) -> bool:
        """Whether no point is left that data decides."""
        return all(
            quantizer.state is State.QUANTIZED or quantizer.spec.dynamic
            for quantizer in self._stops
            if not isinstance(quantizer, WeightQuantizer) or self._needs_data(quantizer)
        )


def rounding_report(weight: Tensor, rounded: Rounded, hessian: Hessian | None) -> dict[str, float]:
    """The error of a rounded weight [N, K]: its own, and with a Hessian H that of its output.

    `weight_sqnr_db` is `10 log10(|W|^2 / |D|^2)` for the difference D; `output_error` is `tr(D H D^T) / tr(W H W^T)`.
    """
    weight = weight.float()
    difference = rounded.qparams.dequantize(rounded.integers, torch.float32) - weight
    noise, signal = difference.square().sum(), weight.square().sum()
    sqnr = (10 * torch.log10(signal / noise)).clamp(-SQNR_CEILING, SQNR_CEILING).nan_to_num(0)
    report = {"weight_sqnr_db": float(sqnr)}
    if hessian is not None and hessian.matrix is not None:
        lost, there = (((part @ hessian.matrix) * part).sum() for part in (difference, weight))
        report |= {"output_error": float(lost / there) if there else 0.0, "rows": float(hessian.rows)}
    return report | dict(rounded.report)


@dataclass
class _Open:
    """A point that is open: an activation without range, or a weight whose rounder waits for data."""

    order: tuple[int, ...]
    quantizer: Quantizer
    walker: Walker

    def decide(self) -> None:
        self.walker.decide(self.quantizer)


@dataclass
class _Gate:
    """The border before a block, at which the forwards wait until all have left the block before."""

    order: tuple[int, ...]
    index: int
    walker: Walker
    decided: bool = False
    hidden: dict[int, Tensor] = field(default_factory=dict)

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.decided:
            self.hidden[BATCH.get()] = entering(args, kwargs)
            wait_at(self)

    def leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.walker.as_tuple = isinstance(output, tuple)

    def decide(self) -> None:
        self.walker.enter_block(self.index, self.hidden)
        self.decided = True
        self.hidden.clear()


@dataclass
class _Once:
    """A module whose ranges are decided when it first runs, so that a second run in the same forward comes too late."""

    name: str
    batches: set[int] = field(default_factory=set)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if BATCH.get() in self.batches:
            raise CalibrationError(
                f"{self.name} runs more than once in a forward, and a sequential walk decides its ranges at the first: "
                f"use calibration.schedule=parallel, or leave its activations float"
            )
        self.batches.add(BATCH.get())


@dataclass
class _Input:
    """The tensor that last met a weight in one forward."""

    raw: Tensor | None = None
    form: str = ""
    hessian: Hessian | None = None


@dataclass(frozen=True)
class _Forward:
    """One batch's run through the model; greenlets have contexts of their own, so it sets what its points read."""

    walker: Walker
    batch: Batch
    index: int
    wait: bool
    last: _Input = field(default_factory=_Input)

    def __call__(self) -> None:
        context = copy_context()
        context.run(PADDING.set, self.batch.mask)
        context.run(SUSPEND.set, self.walker.suspend if self.wait else None)
        context.run(MEET.set, self._meet)
        context.run(BATCH.set, self.index)
        context.run(lambda: self.walker.model(**self.batch.inputs))

    def _meet(self, module: Any, raw: Tensor, x: Tensor) -> None:
        self.walker.meet(module, raw, x, self.last)
        if self.wait and module.weight_quantizer.where in self.walker.hessians:
            self.walker.suspend(module.weight_quantizer)
