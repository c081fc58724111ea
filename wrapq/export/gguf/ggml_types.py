"""Quantized weights in ggml's types, which hold wrapq's codes as they are.

The layouts are those of llama.cpp, `ggml/src/ggml-common.h`; the numbers that they stand for are in `gguf.quants`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from wrapq.errors import ModelError
from wrapq.export.gguf.k_quants import TYPES as K_QUANTS
from wrapq.export.gguf.k_quants import super_blocks
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec

GROUP = 32
NEAREST = {
    "q4_0": "int4:g32:sym:scale=float16",
    "q4_1": "uint4:g32:asym:scale=float16:zero=min",
    "q5_0": "int5:g32:sym:scale=float16",
    "q5_1": "uint5:g32:asym:scale=float16:zero=min",
    "q8_0": "int8:g32:sym:scale=float16",
    "mxfp4": "mxfp4",
    "q4_k": "q4_k",
    "q5_k": "q5_k",
    "q6_k": "q6_k",
}
"""The types, and a spec that each of them says to the bit."""
_INTEGERS = {(4, True): "q4_0", (4, False): "q4_1", (5, True): "q5_0", (5, False): "q5_1", (8, True): "q8_0"}


def type_of(spec: QuantSpec) -> str | None:
    """The type, of `NEAREST`, that holds the codes of a weight in `spec`; None for none."""
    if spec.super_blocks:
        return K_QUANTS.get((spec.dtype.bits, spec.group_size or 0))
    if spec.granularity != "group" or spec.group_size != GROUP or spec.dynamic or spec.global_scale:
        return None
    if spec.dtype.kind == "int":
        return _INTEGERS.get((spec.dtype.bits, spec.symmetric))
    return "mxfp4" if spec.dtype.name == "fp4_e2m1" and spec.scale_dtype == "e8m0" else None


def nearest_type(spec: QuantSpec) -> str:
    """The type, of `NEAREST`, that comes nearest to `spec` with no fewer bits, as far as there are."""
    bits = spec.dtype.bits
    if spec.dtype.kind != "int":
        return "mxfp4" if bits <= 4 else "q8_0"
    if spec.super_blocks and bits <= 6:
        return "q6_k" if spec.symmetric or bits == 6 else f"q{max(4, bits)}_k"
    return "q8_0" if bits > 5 else _INTEGERS[max(4, bits), spec.symmetric]


def blocks(codes: Tensor, qparams: QParams, where: str) -> np.ndarray:
    """The weight of `codes` [N, K] in blocks, uint8 [N, bytes].

    Raises:
        ModelError: a scale is too large for half precision, or groups follow an activation order.
    """
    spec = qparams.spec
    if qparams.permutation is not None:
        raise ModelError(f"{where}: ggml has no layout for groups that follow an activation order")
    levels = (codes.to(torch.int32) - spec.dtype.least_code).to(torch.uint8)
    if spec.super_blocks:
        return _joined(*super_blocks(levels, qparams))
    grouped = levels.unflatten(1, (-1, GROUP)).cpu().numpy()  # [N, G, 32]
    if spec.dtype.kind != "int":
        exponents = qparams.tensors("weight")["weight_scale"][..., None].cpu().numpy()
        return _joined(exponents, _nibbles(grouped))
    scale = qparams.scale.expand(grouped.shape[:2])
    heads = [_half(scale, where)]
    if spec.zero_point == "min" and qparams.zero_point is not None:
        heads.append(_half(-qparams.zero_point.expand(scale.shape), where))
    elif not spec.symmetric:
        zero = torch.zeros_like(scale) if qparams.zero_point is None else qparams.zero_point
        heads.append(_half((spec.dtype.least_code - zero.expand(scale.shape).float()) * scale, where))
    if spec.dtype.bits == 8:
        return _joined(*heads, grouped ^ np.uint8(0x80))  # signed bytes
    fifth = [np.packbits(grouped >> 4, axis=-1, bitorder="little")] if spec.dtype.bits == 5 else []
    return _joined(*heads, *fifth, _nibbles(grouped & np.uint8(15)))


def _nibbles(grouped: np.ndarray) -> np.ndarray:
    """4-bit levels [N, G, 32] in bytes [N, G, 16], the first half of a group in the low halves."""
    packed: np.ndarray = grouped[..., : GROUP // 2] | (grouped[..., GROUP // 2 :] << np.uint8(4))
    return packed


def _half(numbers: Tensor, where: str) -> np.ndarray:
    """Numbers [N, G] in half precision, as bytes [N, G, 2]."""
    short = numbers.detach().half()
    if not bool(torch.isfinite(short).all()):
        raise ModelError(f"{where}: ggml holds scales in half precision, and some of these are too large for it")
    return short[..., None].contiguous().cpu().view(torch.uint8).numpy()


def _joined(*parts: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.concatenate(parts, axis=-1).reshape(len(parts[0]), -1))


def float_tensor(tensor: Tensor, dtype: torch.dtype) -> tuple[np.ndarray, Any]:
    """A tensor in `dtype`, float32, float16 or bfloat16, and ggml's type of it."""
    from gguf import GGMLQuantizationType

    array = tensor.detach().to(dtype).cpu().contiguous()
    if dtype == torch.bfloat16:  # which numpy does not know
        return array.view(torch.uint8).numpy(), GGMLQuantizationType.BF16
    return array.numpy(), GGMLQuantizationType.F32 if dtype == torch.float32 else GGMLQuantizationType.F16
