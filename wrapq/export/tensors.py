"""The tensors of converted modules in compressed-tensors' layouts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wrapq.errors import ModelError
from wrapq.export.scheme import FLOAT, INT, MXFP4, MXFP8, NAIVE, NVFP4, PACK, Scheme
from wrapq.quant.dtypes import DType, dtype_named
from wrapq.quant.packing import pack
from wrapq.quant.qparams import QParams
from wrapq.runtime.module import QuantizedWeight

CACHE_NAMES = {"key": "k", "value": "v"}


def linear_tensors(module: QuantizedWeight, scheme: Scheme, where: str) -> dict[str, Tensor]:
    """What a linear layer called `where` stores but its bias, by the names within it; raises `ModelError` for groups in
    activation order, which no layout holds."""
    qparams, dtype = module.qparams("weight"), module.weight_dtype
    if qparams.permutation is not None:
        raise ModelError(f"{where}: compressed-tensors has no layout for groups that follow an activation order")
    tensors = _LAYOUTS[scheme.format](module.codes(), qparams)
    if tensors["weight_scale"].dtype == torch.float32:
        tensors["weight_scale"] = tensors["weight_scale"].to(dtype)
    if "input" in module.specs and not module.specs["input"].dynamic:
        tensors |= activation_tensors("input", module.qparams("input"), dtype)
    return tensors


def activation_tensors(prefix: str, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """`<prefix>_scale` in the model's `dtype` and, unless symmetric, `<prefix>_zero_point` int8, both [1] or [H, 1, 1];
    of a `local` spec `<prefix>_global_scale` float32 [1] alone."""
    if qparams.spec.local and qparams.global_scale is not None:
        return {f"{prefix}_global_scale": qparams.global_scale}
    tensors = {f"{prefix}_scale": qparams.scale.to(dtype)}
    if not qparams.spec.symmetric:
        tensors[f"{prefix}_zero_point"] = _zero_point(qparams)
    return tensors


def _packed(codes: Tensor, qparams: QParams) -> dict[str, Tensor]:
    """`pack-quantized`: words along the inputs, zero points packed along the outputs."""
    dtype = qparams.spec.dtype
    scale = qparams.scale if qparams.scale.dim() > 1 else qparams.scale.expand(len(codes), 1)
    tensors = {
        "weight_packed": pack(codes, dtype),  # relative to the least code, so the same without a sign
        "weight_shape": torch.tensor(codes.shape),
        "weight_scale": scale.contiguous(),
    }
    if not qparams.spec.symmetric:
        zero_point, signed = _zero_point(qparams).expand(scale.shape), dtype_named(dtype.name.removeprefix("u"))
        tensors["weight_zero_point"] = pack(zero_point.t(), signed).t().contiguous()
    return tensors


def _whole(codes: Tensor, qparams: QParams) -> dict[str, Tensor]:
    """`int-quantized`, `float-quantized` and `naive-quantized`: a byte for each weight."""
    dtype = qparams.spec.dtype
    weight = _to_signed(codes, dtype) if dtype.kind == "int" else codes.view(torch.float8_e4m3fn)
    tensors = {"weight": weight, "weight_scale": qparams.scale}
    if not qparams.spec.symmetric:
        tensors["weight_zero_point"] = _zero_point(qparams)
    return tensors


def _nibbles(codes: Tensor, qparams: QParams) -> dict[str, Tensor]:
    """`nvfp4-` and `mxfp4-pack-quantized`: two codes in a byte, the even column in its low half; scales of one byte."""
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return {"weight_packed": packed, **qparams.tensors("weight")}


def _mxfp8(codes: Tensor, qparams: QParams) -> dict[str, Tensor]:
    """`mxfp8-quantized`: a byte for each weight, a byte of exponent for 32."""
    return {"weight": codes.view(torch.float8_e4m3fn), **qparams.tensors("weight")}


_LAYOUTS: dict[str, Callable[[Tensor, QParams], dict[str, Tensor]]] = {
    PACK: _packed, INT: _whole, FLOAT: _whole, NAIVE: _whole, NVFP4: _nibbles, MXFP4: _nibbles, MXFP8: _mxfp8,
}  # fmt: skip


def _zero_point(qparams: QParams) -> Tensor:
    """The zero point on the signed grid, int8; zero where the spec stores none."""
    zero_point = torch.zeros_like(qparams.scale) if qparams.zero_point is None else qparams.zero_point
    return _to_signed(zero_point, qparams.spec.dtype)


def _to_signed(codes: Tensor, dtype: DType) -> Tensor:
    """Integers of `dtype` on the signed grid of its width, the only one that compressed-tensors knows; int8."""
    offset = 0 if dtype.signed else 1 << (dtype.bits - 1)
    return (codes.to(torch.int32) - offset).to(torch.int8)
