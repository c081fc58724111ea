"""The operators of a lowered model in those of ONNX, opset 21: QuantizeLinear and DequantizeLinear, and plain ones for
ranges that are found as tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import onnx_ir as ir
import torch
import torchao  # noqa: F401 - which registers the operators
from onnx.helper import make_tensor
from onnxscript import opset21 as op

OPSET = 21
TYPES = {4: (ir.DataType.INT4, ir.DataType.UINT4), 8: (ir.DataType.INT8, ir.DataType.UINT8)}
TYPES[16] = ir.DataType.INT16, ir.DataType.UINT16
"""ONNX's integers by their bits, signed and not."""
FLOATS = {ir.DataType.FLOAT8E4M3FN: 448.0, ir.DataType.FLOAT8E5M2: 57344.0}
"""Its floats of 8 bits, with the largest number of each, which is what larger ones become."""
_E4M3 = int(ir.DataType.FLOAT8E4M3FN)  # what an operator of torchao means where it names none


def integer_type(least: int, most: int) -> tuple[ir.DataType, bool]:
    """The smallest type of ONNX that holds the integers `least` to `most`, and whether these are all of it."""
    bits = next(bits for bits in TYPES if most - least < 1 << bits)
    start = -(1 << (bits - 1)) if least < 0 else 0
    return TYPES[bits][least >= 0], (least, most) == (start, start + (1 << bits) - 1)


def _number(value: float, kind: ir.DataType) -> Any:
    return op.Constant(value=make_tensor("", int(kind), [], [value]))


def _quantize(x: Any, scale: Any, zero: Any, least: int, most: int, axis: int | None = None) -> Any:
    kind, whole = integer_type(least, most)
    zero = _number(zero, kind) if isinstance(zero, int) else op.Cast(zero, to=int(kind))
    codes = op.QuantizeLinear(x, scale, zero, **({} if axis is None else {"axis": axis}))
    return codes if whole else op.Clip(codes, _number(least, kind), _number(most, kind))


def _quantize_tensor(x: Any, scale: float, zero: int, least: int, most: int, dtype: int) -> Any:
    return _quantize(x, _float(scale), zero, least, most)


def _dequantize_tensor(x: Any, scale: float, zero: int, least: int, most: int, dtype: int, **_: Any) -> Any:
    return op.DequantizeLinear(x, _float(scale), _number(zero, integer_type(least, most)[0]))


def _quantize_channels(x: Any, scale: Any, zero: Any, axis: int, least: int, most: int, dtype: int) -> Any:
    return _quantize(x, scale, zero, least, most, axis)


def _dequantize_channels(x: Any, scale: Any, zero: Any, axis: int, least: int, most: int, dtype: int, **_: Any) -> Any:
    return _dequantize(x, scale, zero, least, most, axis=axis)


def _dequantize(x: Any, scale: Any, zero: Any, least: int, most: int, **attributes: int) -> Any:
    kind = int(integer_type(least, most)[0])
    codes: Any = op.Cast(x, to=kind)
    return op.DequantizeLinear(codes, scale, op.Cast(zero, to=kind), **attributes)


def _dequantize_blocks(
    x: Any, block: Sequence[Any], scale: Any, zero: Any, dtype: int, least: int, most: int, *_: Any, **__: Any
) -> Any:
    known = len(scale.shape) == 2 and all(isinstance(size, int) for size in (*x.shape, block[1]))
    if known and _is(block[0], 1):  # a weight in groups
        return _dequantize(x, scale, zero, least, most, axis=1, block_size=block[1])
    split, whole = _blocks(x, block)
    zeros = op.Cast(_beside(zero, scale.shape, x, block), to=int(ir.DataType.FLOAT))
    codes: Any = op.Cast(split, to=int(ir.DataType.FLOAT))
    steps = op.Sub(codes, zeros)
    return whole(op.Mul(steps, _beside(scale, scale.shape, x, block)))


def _quantize_blocks(
    x: Any, block: Sequence[Any], scale: Any, zero: Any, dtype: int, least: int, most: int, *_: Any, **__: Any
) -> Any:
    split, whole = _blocks(x, block)
    zeros = op.Cast(_beside(zero, scale.shape, x, block), to=int(ir.DataType.FLOAT))
    steps = op.Add(op.Round(op.Div(split, _beside(scale, scale.shape, x, block))), zeros)
    return whole(op.Cast(op.Clip(steps, *(_float(end) for end in (least, most))), to=dtype))


def _choose_ranges(
    x: Any, kind: str, block: Sequence[Any], dtype: int, least: int, most: int, eps: float, *_: Any, **__: Any
) -> tuple[Any, Any]:
    """Scale and zero point from the range of each block, one number for each, as torchao's `choose_qparams_affine`."""
    reduced = _along_blocks(x, block)
    low, high = (reduce(_blocks(x, block)[0], reduced, keepdims=0) for reduce in (op.ReduceMin, op.ReduceMax))
    low, high = op.Min(low, _float(0)), op.Max(high, _float(0))
    if kind == "SYMMETRIC":
        width, steps = op.Max(op.Neg(low), high), (most - least) / 2
    else:
        width, steps = op.Sub(high, low), most - least
    scale = op.Max(op.Div(width, _float(steps)), _float(eps))
    if kind == "SYMMETRIC":
        zero = op.Add(op.Mul(scale, _float(0)), _float((most + least + 1) // 2))
    else:
        zero = op.Clip(op.Sub(_float(least), op.Round(op.Div(low, scale))), _float(least), _float(most))
    return scale, op.Cast(zero, to=int(ir.DataType.INT32))


def _choose_float_scales(
    x: Any, block: Sequence[Any], dtype: int = _E4M3, scale_dtype: int = 1, hp_value_lb: float = 0, *_: Any
) -> Any:
    """The scale of each block of `x`, as torchao's `choose_scale_float8`."""
    cut = any(len(part) > 1 for part in _parts(x, block))
    bound = op.ReduceMax(op.Abs(_blocks(x, block)[0]), _along_blocks(x, block), keepdims=int(not cut))
    return op.Div(op.Max(bound, _float(hp_value_lb)), _float(FLOATS[ir.DataType(dtype)]))


def _quantize_floats(x: Any, scale: Any, dtype: int = _E4M3) -> Any:
    if not scale.shape:
        return op.QuantizeLinear(x, scale, output_dtype=dtype)
    block = _block_of(x, scale)
    split, whole = _blocks(x, block)
    return whole(op.Cast(op.Div(split, _beside(scale, scale.shape, x, block)), to=dtype))


def _dequantize_floats(x: Any, scale: Any, *_: Any) -> Any:
    if not scale.shape:
        return op.DequantizeLinear(x, scale)
    block = _block_of(x, scale)
    if len(block) == 2 and all(isinstance(size, int) for size in x.shape):  # a weight
        for axis in (0, 1):
            if _is(block[axis], 1) and _is(scale.shape[1 - axis], 1):
                return op.DequantizeLinear(x, op.Squeeze(scale, _integers([1 - axis])), axis=axis)
        if _is(block[0], 1):
            return op.DequantizeLinear(x, scale, axis=1, block_size=block[1])
    split, whole = _blocks(x, block)
    steps: Any = op.Cast(split, to=int(ir.DataType.FLOAT))
    return whole(op.Mul(steps, _beside(scale, scale.shape, x, block)))


def _block_of(x: Any, scale: Any) -> list[Any]:
    """The elements of `x` that share one of as many scales, by axis."""
    block = []
    for size, count in zip(x.shape, scale.shape, strict=True):
        known = isinstance(size, int) and isinstance(count, int)
        block.append(size if _is(count, 1) else size // count if known else 1)
    return block


def _integers(values: Sequence[int]) -> Any:
    return op.Constant(value_ints=list(values))


def _float(value: float) -> Any:
    return _number(float(value), ir.DataType.FLOAT)


def _is(size: Any, value: int) -> bool:
    return isinstance(size, int) and size == value


def _along_blocks(x: Any, block: Sequence[Any]) -> Any:
    """The axes of `_blocks` of `x` along which elements share a scale."""
    wide = [[False] * (len(part) - 1) + [not _is(size, 1)] for size, part in zip(block, _parts(x, block), strict=True)]
    return _integers([axis for axis, each in enumerate(chain(*wide)) if each])


def _parts(x: Any, block: Sequence[Any]) -> list[list[Any]]:
    """For each axis of `x` its size; for one that is cut into blocks of more than one their number and their size."""
    parts: list[list[Any]] = []
    for size, whole in zip(block, x.shape, strict=True):
        cut = isinstance(size, int) and isinstance(whole, int) and 1 < size < whole
        parts.append([whole // size, size] if cut else [whole])
    return parts


def _blocks(x: Any, block: Sequence[Any]) -> tuple[Any, Callable[[Any], Any]]:
    """`x` with the elements of each block along axes of their own, and the way back."""
    parts = _parts(x, block)
    first = next((axis for axis, part in enumerate(parts) if len(part) > 1), None)
    if first is None:
        return x, lambda value: value
    front = [0] * first  # as they are
    apart = _integers([*front, *(size for part in parts[first:] for size in part)])
    together = _integers([*front, *x.shape[first:]])
    return op.Reshape(x, apart), lambda value: op.Reshape(value, together)


def _beside(value: Any, sizes: Sequence[Any], x: Any, block: Sequence[Any]) -> Any:
    """`value`, a scale or zero point for each block of `x`, of `sizes`, so that it broadcasts to `_blocks` of `x`."""
    if len(sizes) < 2 and all(_is(size, 1) for size in sizes):
        return value
    parts, missing, position = _parts(x, block), [], 0
    for size, part in zip(block, parts, strict=True):
        if len(sizes) < len(block) and len(part) == 1 and not _is(size, 1):  # an axis that is one block
            missing.append(position)
        if len(part) == 2:
            missing.append(position + 1)
        position += len(part)
    return op.Unsqueeze(value, _integers(missing)) if missing else value


_DECOMPOSED: Any = torch.ops.quantized_decomposed
_TORCHAO: Any = torch.ops.torchao
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    _DECOMPOSED.quantize_per_tensor.default: _quantize_tensor,
    _DECOMPOSED.dequantize_per_tensor.default: _dequantize_tensor,
    _DECOMPOSED.quantize_per_channel.default: _quantize_channels,
    _DECOMPOSED.dequantize_per_channel.default: _dequantize_channels,
    _TORCHAO.choose_qparams_affine.default: _choose_ranges,
    _TORCHAO.quantize_affine.default: _quantize_blocks,
    _TORCHAO.dequantize_affine.default: _dequantize_blocks,
    _TORCHAO.choose_scale_float8.default: _choose_float_scales,
    _TORCHAO.quantize_affine_float8_non_decomposed.default: _quantize_floats,
    _TORCHAO.dequantize_affine_float8_non_decomposed.default: _dequantize_floats,
}
"""For `custom_translation_table` of `torch.onnx.export`."""
