"""Sizes and memory from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from wrapq.algorithms.base import Corrector
from wrapq.quant.affine import scale_shape, storage_dtype, zero_point_dtype
from wrapq.quant.dtypes import SCALE_BITS, SUPER_BLOCK, dtype_named
from wrapq.quant.packing import packed_columns
from wrapq.quant.spec import QuantSpec
from wrapq.recipe.schema import Recipe
from wrapq.resolve.plan import Estimate, ModulePlan, PartPlan, StagePlan
from wrapq.resolve.stages import algorithm_of

_PARAMETER_BYTES = 4
"""Of a word of packed integers (int32) and of a global scale (float32)."""
_SHAPE_BYTES = 16
"""Of a packed weight's own shape, two int64."""
_STREAM_COPIES = 4
"""Tensors of hidden-state size that one suspended batch keeps alive: residual, normalized input, two of a branch."""


def weight_bytes(shape: tuple[int, int], spec: QuantSpec) -> int:
    """Bytes of a packed weight [N, K] with its scales and, where it has them, zero points and a global scale."""
    rows, columns = shape
    packed = rows * packed_columns(columns, spec.dtype) * _PARAMETER_BYTES
    if spec.super_blocks:
        words = packed_columns(columns // (spec.group_size or 1), dtype_named(spec.scale_dtype)) * _PARAMETER_BYTES
        scales = rows * (words + columns // SUPER_BLOCK * torch.float16.itemsize)
        return packed + (scales if spec.symmetric else 2 * scales)
    scales = math.prod(scale_shape(shape, spec))
    zero_points = 0 if spec.symmetric and spec.dtype.signed else scales
    zero_bytes = zero_points * zero_point_dtype(spec).itemsize
    global_scale = _PARAMETER_BYTES if spec.global_scale else 0
    return packed + scales * SCALE_BITS[spec.scale_dtype] // 8 + zero_bytes + global_scale


def estimate(
    model: nn.Module,
    modules: Sequence[ModulePlan],
    recipe: Recipe,
    stages: Sequence[StagePlan],
    parts: Sequence[PartPlan] = (),
) -> Estimate:
    """What the run costs and leaves; the few bytes of each fixed activation's parameters are not counted, and what PT2E
    quantizes is taken for float, since its quantizers tell no sizes.

    The peak is the float weights, the codes chosen (a byte each up to 8 bits), the dequantized copies
    that a fake-quantized forward multiplies with, and, in a sequential walk, the hidden states of all batches.
    """
    itemsize = next(model.parameters()).itemsize
    float_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    seen, untied = set[int](), _untied_bytes(model, stages)
    replaced = packed = shapes = integers = dequantized = weights = 0
    for module in modules:
        spec = next((p.quant_spec for p in module.points if p.role == "weight"), None)
        tensor = model.get_submodule(module.name)._parameters.get("weight")
        if spec is None or tensor is None or module.weight_shape is None or (id(tensor) in seen and not untied):
            continue
        seen.add(id(tensor))
        weights += tensor.numel()
        replaced += tensor.nbytes
        packed += weight_bytes(module.weight_shape, spec)
        packed += itemsize * _added_elements(module, stages)
        shapes += _SHAPE_BYTES
        integers += tensor.numel() * storage_dtype(spec.dtype).itemsize
        dequantized += tensor.nbytes
    calibration = recipe.calibration
    tokens = calibration.samples * calibration.seq_len if parts or any(stage.needs for stage in stages) else 0
    hidden = getattr(getattr(model, "config", None), "hidden_size", 0) or 0
    one_batch = min(tokens, calibration.batch_size * calibration.seq_len)
    in_flight = tokens if calibration.schedule == "sequential" else one_batch
    return Estimate(
        float_bytes=float_bytes,
        quantized_bytes=float_bytes + untied - replaced + packed + shapes,
        bits_per_weight=8 * packed / weights if weights else None,
        calibration_tokens=tokens,
        peak_bytes=float_bytes + integers + dequantized + in_flight * hidden * itemsize * _STREAM_COPIES,
    )


def _untied_bytes(model: nn.Module, stages: Sequence[StagePlan]) -> int:
    """What a stage that gives tied modules weights of their own adds to the model."""
    if not any(stage.options.get("untie") and stage.targets for stage in stages):
        return 0
    named = model.named_parameters(remove_duplicate=False)
    return sum(p.nbytes for _, p in named) - sum(p.nbytes for p in model.parameters())


def _added_elements(module: ModulePlan, stages: Sequence[StagePlan]) -> int:
    """How many numbers the corrections of `stages` add to the weight of `module`; a bias of its own takes theirs."""
    here = (s for s in stages if s.phase == "correct" and f"{module.name}.weight" in s.targets)
    correctors = (cast(Corrector, algorithm_of(stage)) for stage in here if module.weight_shape)
    counted = (corrector for corrector in correctors if corrector.adds != "bias" or not module.has_bias)
    return sum(corrector.added_elements(cast(tuple[int, int], module.weight_shape)) for corrector in counted)
