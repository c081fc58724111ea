"""The quality of a wrapped model at each stage: float, with quantized weights, with quantized activations too."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from wrapq.calibration.block_loader import IN_MEMORY, BlockLoader
from wrapq.calibration.finalize import release
from wrapq.calibration.offload import Offload
from wrapq.calibration.scheduler import run_blocks
from wrapq.calibration.walker import Walker
from wrapq.data.samples import Samples
from wrapq.engine.calibrate import offloading, tell_cache
from wrapq.engine.context import Run
from wrapq.engine.float_cache import FloatOutputs, float_outputs
from wrapq.errors import ModelError
from wrapq.evaluation.quality import LayerErrorMeter, StageMeter
from wrapq.graph.blocks import find_blocks, giving, replaced_forward
from wrapq.graph.head import Head
from wrapq.half_products import in_products
from wrapq.large_pages import give_back
from wrapq.metrics import FLOAT, QUANTIZED, WEIGHTS
from wrapq.observers.forward_context import forward_context, in_context, outside_batch
from wrapq.wrappers.model import iter_quantizers
from wrapq.wrappers.quantizer import Quantizer, WeightQuantizer


@dataclass(frozen=True)
class Quality:
    """The measured quality.

    Attributes:
        stages: for each stage its metrics: perplexity, nll, kl (nats per token, to the float model), top1_agreement.
        curves: error of each block's output over the block's index, after everything is quantized.
    """

    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)


Stages = Mapping[str, Callable[[Quantizer], bool]]
"""The states of a model that are compared, the first with all others: by name, which of its points quantize there."""


def stages_of(model: nn.Module) -> Stages:
    """The stages worth measuring apart: `weights` only where both weights and activations are quantized."""
    roles = {isinstance(quantizer, WeightQuantizer) for quantizer in iter_quantizers(model)}
    weights: Stages = {WEIGHTS: lambda q: isinstance(q, WeightQuantizer)} if len(roles) == 2 else {}
    return {FLOAT: lambda _: False, **weights, QUANTIZED: lambda _: True}


def measure_run(run: Run, walker: Walker, samples: Samples) -> Quality:
    """Measure the calibrated model of a run, and record what came of it."""
    size = run.plan.recipe.evaluation.batch_size
    steps = (walker.blocks.count, "block") if run.streaming else (-(-len(samples.input_ids) // size), "batch")
    known = float_outputs(run, walker.model, samples)
    with run.step("evaluate", "Measuring quality", *steps) as advance, offloading(run, walker.model) as offload:
        quality = measure_stages(walker.model, samples, size, advance, walker.options.loader, offload, known)
    if known is not None:
        tell_cache(run, known, "evaluation_", "what the float model gives on {} evaluation batches")
    for stage, metrics in quality.stages.items():
        run.tracker.metrics({f"{stage}/{name}": value for name, value in metrics.items() if name != "tokens"})
    run.tracker.curves(quality.curves)
    return quality


@torch.no_grad()
def measure_stages(
    model: nn.Module,
    samples: Samples,
    batch_size: int,
    advance: Callable[[], None],
    loader: BlockLoader = IN_MEMORY,
    offload: Offload | None = None,
    known: FloatOutputs | None = None,
    stages: Stages | None = None,
) -> Quality:
    """All stages side by side, batch by batch, so that nothing of the float model has to be held in memory.

    Args:
        model: a wrapped model, every point quantized.
        samples: what to measure on.
        batch_size: windows per forward.
        advance: called after each batch; after each block where they are streamed.
        loader: loads the model's blocks; where they are streamed, all batches go through a block before the next.
        offload: keeps what the batches hold meanwhile within a limit of memory.
        known: what the float blocks give, where it need not be computed; not for streamed ones.
        stages: those that are measured, `FLOAT` first and `QUANTIZED` last; `stages_of` the model when not given.
    """
    measuring = _Measuring(model, stages or stages_of(model), known)
    forwards: list[Callable[[], None]] = []
    for batch, (ids, mask, counted) in enumerate(samples.batches(batch_size, device_of(model))):
        last = advance if not loader.streamed else lambda: None
        forwards += [
            partial(measuring.run, batch, stage, ids, mask, counted, last if stage == QUANTIZED else lambda: None)
            for stage in measuring.stages
        ]
    with measuring.block_outputs():
        if loader.streamed:
            layers, numbered = measuring.layers, [partial(_as_batch, *item) for item in enumerate(forwards)]
            run_blocks(layers, numbered, loader=loader, offload=offload, finish=lambda *_: advance())
        else:
            for forward in forwards:
                forward()
    release(iter_quantizers(model))
    results = {stage: _result(meter, stage) for stage, meter in measuring.meters.items()}
    return Quality(results, measuring.errors.curves("layer/"))


class _Measuring:
    """Forwards of several stages, of which one may be put aside in the middle for another; each batch's come in turn.

    What the bodies gave is kept until that of the last stage is there; then logits are made of them and compared.
    """

    def __init__(self, model: nn.Module, stages: Stages, known: FloatOutputs | None) -> None:
        self.model, self.stages, self.known = model, stages, known
        self.meters = {stage: StageMeter(against_float=stage != FLOAT) for stage in stages}
        self.errors = LayerErrorMeter()
        self.blocks = find_blocks(model)
        self.layers = [model.get_submodule(name) for name in self.blocks.names()]
        self._points: dict[int | None, list[Quantizer]] = {}
        for quantizer in iter_quantizers(model):
            self._points.setdefault(self.blocks.index(quantizer.where), []).append(quantizer)
        self._now: tuple[int, str, Tensor | None] = (0, FLOAT, None)
        self._started: list[tuple[int, str, Tensor | None]] = []
        self._head = Head(model)
        self._hidden: dict[str, Any] = {}  # of one batch, by stage
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._tuples = False  # some block gives more than its hidden states

    def run(
        self,
        batch: int,
        stage: str,
        ids: Tensor,
        mask: Tensor | None,
        counted: Tensor | None,
        finished: Callable[[], None],
    ) -> None:
        """One batch [B, T] at one stage; at the positions `counted` the logits are measured."""
        self._now = (batch, stage, mask)
        self._started.append(self._now)
        self._enable(chain.from_iterable(self._points.values()), stage)
        try:
            forward = self._float_hidden if stage == FLOAT and self.known else self._head.hidden
            self._hidden[stage] = forward(ids, mask)
            if stage == QUANTIZED:
                self._compare(ids, counted)
        finally:
            self._enable(chain.from_iterable(self._points.values()), QUANTIZED)
        finished()

    def _compare(self, ids: Tensor, counted: Tensor | None) -> None:
        """Judge the logits of all stages, part by part of the positions."""
        parts = list(self._head.parts(ids.shape, overlap=1))
        if len(parts) > 1:  # of a large vocabulary, whose head needs the room
            release(chain.from_iterable(points for block, points in self._points.items() if block is not None))
            give_back()
        for part in parts:
            reference, some = None, None if counted is None else counted[:, part]
            for stage, hidden in self._hidden.items():
                self._enable(self._points.get(None, ()), stage)
                logits = self._head.logits(hidden, part)
                self.meters[stage].update(reference, logits, ids[:, part], some)
                reference = logits if reference is None else reference
                del logits  # before the next ones are made
        self._hidden.clear()

    def _float_hidden(self, ids: Tensor, mask: Tensor | None) -> Any:
        """What the body of the float model gives, whose blocks run only where it is not known what they give."""
        known, batch = cast(FloatOutputs, self.known), self._now[0]
        if outputs := known.get(batch):
            gives = [giving(output.to(ids.device)) for output in outputs]
            with replaced_forward(dict(zip(self.layers, gives, strict=True))):
                return self._head.hidden(ids, mask)
        start = time.perf_counter()
        hidden = self._head.hidden(ids, mask)
        if self.layers and not self._tuples:
            seconds = time.perf_counter() - start
            known.keep(batch, [self._outputs[index, batch] for index in range(len(self.layers))], seconds)
        return hidden

    def _resume(self, block: int, *_: object) -> None:
        """Forward pre-hook of a block: the forward that comes to it may have waited there while others ran."""
        if (number := forward_context().batch) is not None:
            self._now = self._started[number]
            self._enable((*self._points.get(block, ()), *self._points.get(None, ())), self._now[1])

    def _enable(self, quantizers: Iterable[Quantizer], stage: str) -> None:
        """Let only the points of `stage` quantize."""
        for quantizer in quantizers:
            quantizer.enabled = self.stages[stage](quantizer)

    @contextmanager
    def block_outputs(self) -> Iterator[None]:
        """While this holds the outputs of the float and the quantized blocks are compared."""

        def compare(index: int, module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            batch, stage, mask = self._now
            hidden = output if isinstance(output, Tensor) else output[0]
            self._tuples |= hidden is not output
            if stage == FLOAT:
                with outside_batch():  # a copy, which is not put aside with what the forward holds
                    self._outputs[index, batch] = hidden.clone()
            elif stage == QUANTIZED:
                self.errors.update(index, self._outputs.pop((index, batch)), hidden, mask)

        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.callback(layer.register_forward_pre_hook(partial(self._resume, index)).remove)
                stack.callback(layer.register_forward_hook(partial(compare, index)).remove)
            yield


def _as_batch(number: int, forward: Callable[[], None]) -> None:
    with in_context(batch=number):
        forward()


@torch.no_grad()
def measure(model: nn.Module, samples: Samples, batch_size: int, advance: Callable[[], None]) -> dict[str, float]:
    """The quality of any model, without another to compare it with."""
    meter, head = StageMeter(against_float=False), Head(model)
    for ids, mask, counted in samples.batches(batch_size, device_of(model)):
        with in_products():
            hidden = head.hidden(ids, mask)
        for part in head.parts(ids.shape, overlap=1):
            meter.update(None, head.logits(hidden, part), ids[:, part], None if counted is None else counted[:, part])
        advance()
    return _result(meter, FLOAT)


def _result(meter: StageMeter, stage: str) -> dict[str, float]:
    """The metrics; raises `ModelError` where they are no numbers, which every later figure would only repeat."""
    metrics = meter.result()
    if not math.isfinite(metrics["nll"]):
        what = "with its weights quantized " if stage == WEIGHTS else "fully quantized " if stage == QUANTIZED else ""
        remedy = "a weight is NaN or infinite, or the range of model.dtype too small for it"
        raise ModelError(f"the model {what}gives NaN or infinite logits on the evaluation data: {remedy}")
    return metrics


def forward_logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The logits [B, T, V] of token ids [B, T]."""
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def device_of(model: nn.Module) -> torch.device:
    """The device of the model; blocks that are not in memory do not count."""
    return next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
