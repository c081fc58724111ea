"""The quality of a wrapped model at each stage: float, with quantized weights, with quantized activations too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wrapq.calibration.blocks import find_blocks
from wrapq.calibration.data import Samples
from wrapq.errors import ModelError
from wrapq.evaluation.quality import LayerErrorMeter, QualityMeter
from wrapq.wrappers.model import iter_quantizers
from wrapq.wrappers.quantizer import WeightQuantizer

FLOAT, WEIGHTS, QUANTIZED = "float", "weights", "quantized"


@dataclass(frozen=True)
class Quality:
    """What was measured.

    Attributes:
        stages: for each stage its metrics: perplexity, nll, kl (nats per token, to the float model), top1_agreement.
        curves: error of each block's output over the block's index, after everything is quantized.
    """

    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)


def stages_of(model: nn.Module) -> tuple[str, ...]:
    """The stages worth measuring apart: `weights` only where both weights and activations are quantized."""
    roles = {isinstance(quantizer, WeightQuantizer) for quantizer in iter_quantizers(model)}
    return (FLOAT, WEIGHTS, QUANTIZED) if len(roles) == 2 else (FLOAT, QUANTIZED)


@torch.no_grad()
def measure_stages(model: nn.Module, samples: Samples, batch_size: int, advance: Callable[[], None]) -> Quality:
    """All stages side by side, batch by batch, so that nothing of the float model has to be kept.

    Args:
        model: a wrapped model, every point quantized.
        samples: what to measure on.
        batch_size: windows per forward.
        advance: called after each batch.
    """
    stages = stages_of(model)
    meters, layers = {stage: QualityMeter() for stage in stages}, LayerErrorMeter()
    device = next(model.parameters()).device
    for ids, mask in samples.batches(batch_size):
        ids, mask = ids.to(device), None if mask is None else mask.to(device)
        outputs = {}
        reference = None
        for stage in stages:
            with _only(model, stage), _block_outputs(model) as blocks:
                logits = forward_logits(model, ids, mask)
            meters[stage].update(reference, logits, ids, mask)
            reference = logits if reference is None else reference
            outputs[stage] = blocks
        for index, (before, after) in enumerate(zip(outputs[FLOAT], outputs[QUANTIZED], strict=True)):
            layers.update(index, before, after, mask)
        advance()
    return Quality({stage: _result(meter, stage) for stage, meter in meters.items()}, layers.curves("layer/"))


@torch.no_grad()
def measure(model: nn.Module, samples: Samples, batch_size: int, advance: Callable[[], None]) -> dict[str, float]:
    """The quality of any model, without another to compare it with."""
    meter, device = QualityMeter(), next(model.parameters()).device
    for ids, mask in samples.batches(batch_size):
        ids, mask = ids.to(device), None if mask is None else mask.to(device)
        meter.update(None, forward_logits(model, ids, mask), ids, mask)
        advance()
    return _result(meter, FLOAT)


def _result(meter: QualityMeter, stage: str) -> dict[str, float]:
    """What was measured; raises `ModelError` where it is no number, which every later figure would only repeat."""
    metrics = meter.result()
    if not math.isfinite(metrics["nll"]):
        what = "with its weights quantized " if stage == WEIGHTS else "fully quantized " if stage == QUANTIZED else ""
        remedy = "a weight is NaN or infinite, or the range of model.dtype too small for it"
        raise ModelError(f"the model {what}gives NaN or infinite logits on the evaluation data: {remedy}")
    return metrics


def forward_logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The logits [B, T, V] of token ids [B, T]."""
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@contextmanager
def _only(model: nn.Module, stage: str) -> Iterator[None]:
    """Let only the points of `stage` quantize."""
    quantizers: Sequence = list(iter_quantizers(model))
    try:
        for quantizer in quantizers:
            weight = isinstance(quantizer, WeightQuantizer)
            quantizer.enabled = stage == QUANTIZED or (stage == WEIGHTS and weight)
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enabled = True


@contextmanager
def _block_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    hooks = [model.get_submodule(name).register_forward_hook(keep) for name in find_blocks(model).names()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
